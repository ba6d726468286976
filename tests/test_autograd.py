"""The specification of rebased/autograd.py: first derivatives exact, second ones refused, whoever asks."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch

from rebased import kernels, linear_attention, model
from rebased.autograd import first_order_only
from rebased.mamba import Mamba
from rebased.rwkv import RWKV

def double(do, x, none):
    """The gradient of x², behind autograd's back; and one that does not exist."""
    assert none is None and not torch.is_grad_enabled()
    return (2 * x).mul_(do), None


class Square(torch.autograd.Function):
    """x² with a backward pass written by hand."""

    @staticmethod
    def forward(ctx, x, other):
        ctx.save_for_backward(x, None)
        return x * x

    @staticmethod
    def backward(ctx, do):
        return first_order_only(double, (do, *ctx.saved_tensors), instead="x * x")


@pytest.fixture
def x():
    return torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("create_graph", [False, True])
def test_first_derivatives(x, create_graph):
    (first,) = torch.autograd.grad(Square.apply(x, 1).sum(), x, create_graph=create_graph)
    assert torch.equal(first, 2 * x) and first.requires_grad == create_graph
    assert torch.autograd.gradcheck(Square.apply, (x, 1))


@pytest.mark.parametrize("upstream", [lambda o: o.sum(), lambda o: o.square().sum(), lambda o: (o * o.detach()).sum()])
def test_second_derivatives_are_refused(x, upstream):
    """With an incoming gradient that is a constant, and with one that depends on x."""
    (first,) = torch.autograd.grad(upstream(Square.apply(x, 1)), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no derivative of its own: .* use x \* x"):
        torch.autograd.grad(first.sum(), x)
    with pytest.raises(RuntimeError, match="no derivative of its own"):
        torch.autograd.functional.hessian(lambda y: upstream(Square.apply(y, 1)), x)


def test_an_incoming_gradient_alone(x):
    """x is a constant, but the gradient that comes in is not: its own derivative is refused, too."""
    do = torch.ones(3, dtype=torch.float64, requires_grad=True)
    leaf = x.detach().requires_grad_()
    (first,) = torch.autograd.grad(Square.apply(leaf, 1), leaf, do, create_graph=True)
    with pytest.raises(RuntimeError, match="no derivative of its own"):
        torch.autograd.grad(first.sum(), do)


KERNEL = kernels.KERNELS["rebased"](4)
BY_HAND = {
    "attention": lambda x: linear_attention.attention(x, x, x, KERNEL),
    "mamba": Mamba(SimpleNamespace(d_model=4)),
    "rwkv": RWKV(4, 0, 2),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_torch_func_and_trace_are_told_what_to_take(name):
    x = torch.randn(1, 2, 9, 4) if name == "attention" else torch.randn(2, 9, 4)
    other = "quadratic_attention of 02" if name == "attention" else f"{name}_loop of rebased"
    for transform in (torch.func.vmap, lambda f: torch.func.grad(lambda x: f(x).sum())):
        with pytest.raises(RuntimeError, match=f"torch.func cannot look into .* give it .*{other}") as error:
            transform(BY_HAND[name])(x.unsqueeze(0) if transform is torch.func.vmap else x)
        assert "\n" not in str(error.value)
    with pytest.raises(RuntimeError, match=f"torch.jit.trace cannot record .* trace .*{other}"):
        torch.jit.trace(BY_HAND[name], (x,))


def test_torch_func_works_with_the_readable_forms():
    x = torch.randn(3, 1, 2, 9, 4)
    for form in (linear_attention.quadratic_attention, linear_attention.chunked_attention):
        def of_one(x, form=form):
            return form(x, x, x, KERNEL)

        torch.testing.assert_close(torch.func.vmap(of_one)(x), torch.stack([of_one(one) for one in x]))
        one = x[0].requires_grad_()
        (expected,) = torch.autograd.grad(of_one(one).sum(), one)
        torch.testing.assert_close(torch.func.grad(lambda x, form=form: form(x, x, x, KERNEL).sum())(one), expected)


def per_sample_gradients(language_model, tokens):
    """Of the sum of all logits, by parameter: tokens (B, T) -> (B, *parameter)."""
    parameters = dict(language_model.named_parameters())

    def of_one(parameters, tokens):
        return torch.func.functional_call(language_model, parameters, (tokens.unsqueeze(0),)).square().sum()

    return torch.func.vmap(torch.func.grad(of_one), (None, 0))(parameters, tokens)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_per_sample_gradients_of_a_model():
    """With softmax they are those of each sample alone; with a kernel the error names the forms that can do it."""
    tokens = torch.randint(20, (3, 9), generator=torch.Generator().manual_seed(0))
    softmax = model.LanguageModel(model.ModelConfig(("short_conv", "attention"), 20, 8)).double()
    found = per_sample_gradients(softmax, tokens)
    for number in range(3):
        softmax.zero_grad()
        softmax(tokens[number : number + 1]).square().sum().backward()
        for name, parameter in softmax.named_parameters():
            torch.testing.assert_close(found[name][number], parameter.grad)
    with pytest.raises(RuntimeError, match="torch.func cannot look into .* quadratic_attention of 02"):
        per_sample_gradients(model.LanguageModel(model.ModelConfig(("rebased",), 20, 8)), tokens)


@pytest.mark.parametrize("mixer", ["rebased", "based", "elementwise", "attention"])
def test_the_meta_device_gives_shapes(mixer):
    with torch.device("meta"):
        language_model = model.LanguageModel(model.recall_config(mixer))
        tokens = torch.zeros(2, 40, dtype=torch.int64)
        positions = torch.zeros(2, 3, dtype=torch.int64)
    logits = language_model(tokens)
    logits.sum().backward()
    assert logits.shape == (2, 40, 256) and language_model.logits_at(tokens, positions).shape == (2, 3, 256)
    logits, states = language_model.step(tokens[:, 0], language_model.prefill(tokens)[1])
    assert logits.shape == (2, 256) and states.length == 41


@pytest.mark.parametrize("mixer", ["rebased", "attention"])
def test_states_are_copied_and_pickled_also_off_a_graph(mixer):
    language_model = model.LanguageModel(model.recall_config(mixer))
    _, states = language_model.prefill(torch.ones(1, 5, dtype=torch.int64))
    following = torch.ones(1, dtype=torch.int64)
    expected, _ = language_model.step(following, states)
    for copied in (copy.deepcopy(states), pickle.loads(pickle.dumps(copy.deepcopy(states)))):
        assert type(copied) is type(states) and type(copied.layers[1]) is type(states.layers[1])
        assert not copied.layers[1][0].requires_grad
        assert torch.equal(language_model.step(following, copied)[0], expected)


@pytest.mark.parametrize("mixer", ["rebased", "conv_attention"])
@pytest.mark.parametrize("positions", [torch.zeros(1, 3, dtype=torch.int64), torch.zeros(2, 3), torch.full((2, 1), 9)])
def test_places_that_are_none_are_named(mixer, positions):
    language_model = model.LanguageModel(model.recall_config(mixer))
    attention, x = language_model.blocks[-1].mixer, torch.randn(2, 9, 64)
    for function in (attention.at, attention.weights):
        with pytest.raises(ValueError, match="positions must"):
            function(x, positions)
    with pytest.raises(ValueError, match="positions must"):
        language_model.logits_at(torch.ones(2, 9, dtype=torch.int64), positions)
