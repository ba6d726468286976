"""The specification of rebased/autograd.py: first derivatives exact, second ones refused, whoever asks."""

import pytest
import torch

from rebased.autograd import first_order_only

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
