"""rebased/scan.py, mamba.py and rwkv.py: scans against loops, states, extremes, starts, and both in the model of 03."""

import io
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn

from rebased import linear_attention, mamba, model, rwkv, scan

relative_error = linear_attention.relative_error

LOOPS = {"mamba": mamba.mamba_loop, "rwkv": rwkv.rwkv_loop}
NAMES = list(LOOPS)


@pytest.fixture(autouse=True)
def both_are_blocks(monkeypatch):
    monkeypatch.setitem(model.BLOCKS, "mamba", mamba.MambaBlock)
    monkeypatch.setitem(model.BLOCKS, "rwkv", rwkv.RWKVBlock)


def make_layer(name, d_model):
    if name == "mamba":
        return mamba.Mamba(SimpleNamespace(d_model=d_model))
    return rwkv.RWKV(d_model, layer=0, layers=2)


def example(name, T=37, B=3, d_model=12, seed=0):
    """A layer and x (B, T, d_model) in float64. 37 tokens are two blocks of Mamba's scan and a bit."""
    torch.manual_seed(seed)
    layer = make_layer(name, d_model).double()
    return layer, torch.randn(B, T, d_model, dtype=torch.float64, requires_grad=True)


def gradients(y, layer, x, upstream=None):
    if upstream is None:
        upstream = torch.ones_like(y)
    return torch.autograd.grad(y, [x, *layer.parameters()], upstream, materialize_grads=True, allow_unused=True)


# The recurrence
@pytest.mark.parametrize("T", [*range(1, 18), 31, 32, 33, 100])
def test_scans_at_every_length(T):
    """Both directions, and the running maximum, against loops."""
    a = torch.rand(T, 2, 1, 3, dtype=torch.float64)
    h = torch.randn(T + 1, 2, 4, 3, dtype=torch.float64)
    w = -torch.rand(3, dtype=torch.float64)
    forward = h.clone()
    back = h.clone()
    largest = h.clone()
    for t in range(T):
        forward[t + 1] += a[t] * forward[t]
        largest[t + 1] = torch.maximum(largest[t + 1], largest[t] + w)
        back[T - 1 - t] += a[T - 1 - t] * back[T - t]
    found = [h.clone(), h.clone(), h.clone()]
    scan.solve(a, found[0])
    scan.solve_back(a, found[1])
    rwkv.running_max(w, found[2])
    for ours, theirs in zip(found, (forward, back, largest), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_gradient_that_comes_in_stays_as_it_is():
    """The scan backwards works in place, on a copy: the gradient belongs to the caller."""
    a, b, h = torch.rand(9, 2, 1, 3), torch.rand(9, 2, 4, 3), torch.rand(2, 4, 3)
    inputs = [x.double().requires_grad_() for x in (a, b, h)]
    upstream = torch.rand(10, 2, 4, 3, dtype=torch.float64)
    before = upstream.clone()
    torch.autograd.grad(scan.Recurrence.apply(*inputs), inputs, upstream)
    assert torch.equal(upstream, before)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "T, B, d_model", [(1, 1, 1), (1, 2, 8), (2, 1, 3), (16, 2, 8), (17, 1, 33), (50, 5, 4), (37, 3, 12)]
)
def test_layer_equals_loop(name, T, B, d_model):
    """Outputs and all gradients are those of the recurrence token by token, within 1e-9."""
    layer, x = example(name, T, B, d_model)
    y = layer(x)
    expected = LOOPS[name](layer, x)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-12)
    upstream = torch.randn_like(y)
    pairs = zip(gradients(y, layer, x, upstream), gradients(expected, layer, x, upstream), strict=True)
    for found, theirs in pairs:  # the second term: for gradients that are 0 but for rounding
        assert (found - theirs).norm() < 1e-9 * theirs.norm() + 1e-14


@pytest.mark.parametrize("name", NAMES)
def test_blocks_do_not_matter(name, monkeypatch):
    """Mamba in blocks of five tokens and three sequences: the same outputs and gradients as all at once."""
    layer, x = example(name, T=23, B=7)
    results = []
    for tokens, numbers in ((1000, 2**30), (5, 3 * 5 * 16 * 24)):
        monkeypatch.setattr(mamba, "TOKENS", tokens)
        monkeypatch.setattr(mamba, "NUMBERS", numbers // torch.get_num_threads())
        y = layer(x)
        results.append([y, *gradients(y.square(), layer, x)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_selective_scan_gradcheck():
    """Finite differences, every input and both outputs."""
    torch.manual_seed(0)
    u = torch.randn(19, 2, 3, dtype=torch.float64)
    h = torch.randn(2, 4, 3, dtype=torch.float64)
    write, read = torch.randn(2, 19, 2, 4, dtype=torch.float64)
    inputs = u, torch.rand_like(u), -torch.rand(4, 3, dtype=torch.float64), write, read, h
    assert torch.autograd.gradcheck(mamba.selective_scan, [x.requires_grad_() for x in inputs])


def test_wkv_gradcheck():
    """Finite differences: the running maximum carries no gradient, and none is missing."""
    torch.manual_seed(0)
    k, v = torch.randn(2, 11, 2, 3, dtype=torch.float64)
    decay, first = torch.randn(2, 3, dtype=torch.float64)
    h = torch.rand(2, 2, 3, dtype=torch.float64)
    largest = torch.randn(2, 3, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (k, v, decay, first, h)]
    assert torch.autograd.gradcheck(lambda *inputs: rwkv.wkv(*inputs, largest)[0], inputs)


@pytest.mark.parametrize("name", NAMES)
def test_a_second_derivative_is_refused(name):
    """y.sum() has a constant as incoming gradient: even so nothing wrong comes out silently."""
    layer, x = example(name, T=5)
    (first,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no derivative of its own.*loop"):
        torch.autograd.grad(first.square().sum(), x)


def test_memory_is_linear_in_length():
    """What backward keeps of the scan: one state a block, no (T, B, 16, E)."""
    saved = []
    u = torch.rand(256, 1, 32, requires_grad=True)
    A = -torch.rand(16, 32)
    write = torch.rand(256, 1, 16)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x):
        mamba.selective_scan(u, torch.rand(256, 1, 32), A, write, write, torch.zeros(1, 16, 32))
    assert torch.Size([256 // mamba.TOKENS, 1, 16, 32]) in saved
    assert sum(shape.numel() for shape in saved) < 256 * 16 * 32 / 2


# States
@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_cut_anywhere(name):
    """In two parts at every place, or token by token: the same output."""
    layer, x = example(name)
    whole = layer(x)
    state = None
    steps = []
    for t in range(x.shape[1]):
        y, state = layer(x[:, t : t + 1], state, return_state=True)
        steps.append(y)
        rest = [layer(x[:, t + 1 :], state)] if t + 1 < x.shape[1] else []
        assert relative_error([torch.cat(steps + rest, dim=1)], [whole]) < 1e-9, f"cut after {t + 1} tokens"


@pytest.mark.parametrize("name", NAMES)
def test_gradients_flow_through_the_state(name):
    """Cut at 9: gradients of inputs and parameters are those of the whole."""
    layer, x = example(name, T=25)
    upstream = torch.randn(3, 25, 12, dtype=torch.float64)
    first, state = layer(x[:, :9], return_state=True)
    parts = torch.cat([first, layer(x[:, 9:], state)], 1)
    pairs = zip(gradients(parts, layer, x, upstream), gradients(layer(x), layer, x, upstream), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("name, numbers", [("mamba", 19 * 24), ("rwkv", 4 * 12)])
def test_states_are_values_of_constant_size(name, numbers):
    """The same size at any T, in memory and in a file, and usable twice."""
    layer, x = example(name)
    for T in (1, 2, 5, 37):
        _, state = layer(x[:, :T], return_state=True)
        assert sum(part.numel() for part in state) == 3 * numbers
        assert sum(part.untyped_storage().nbytes() for part in state) == 8 * 3 * numbers
    kept = [part.clone() for part in state]
    once = layer(x, state)
    twice = layer(x, state)
    assert torch.equal(once, twice)
    assert all(map(torch.equal, kept, state))
    file = io.BytesIO()
    torch.save(state, file)
    assert file.tell() < 8 * 3 * numbers + 4096


# Causality, and sequences that do not meet
@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_the_future_cannot_change_the_past(name):
    layer, x = example(name)
    other = torch.cat([x[:, :13], x[:, 13:] + 1], 1)
    torch.testing.assert_close(layer(x)[:, :13], layer(other)[:, :13], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("name", NAMES)
def test_an_infinity_stays_in_its_sequence(name, bad, monkeypatch):
    """Outputs, states and gradients of the others are what they are without it, bit for bit."""
    monkeypatch.setattr(mamba, "NUMBERS", 3 * 16 * 16 * 24)  # several groups of sequences
    layer, x = example(name, B=8)
    others = [0, 1, 3, 4, 5, 6, 7]
    spoilt = x.detach().clone()
    spoilt[2, 20, 3] = bad
    spoilt.requires_grad_()
    results = []
    for inputs in (x, spoilt):
        y, state = layer(inputs, return_state=True)
        (dx,) = torch.autograd.grad(y.square().sum(), inputs)
        results.append([y[others], dx[others], layer(x[:, :2], state)[others]])
    for clean, beside in zip(*results, strict=True):
        assert torch.equal(clean, beside)


# Extremes
def compare_with_float64(layer, x, tolerance=1e-4):
    """Output and gradient of x in float32: finite, and within the tolerance of float64."""
    results = []
    for dtype in (torch.float64, torch.float32):
        layer = layer.to(dtype)
        inputs = x.detach().to(dtype).requires_grad_()
        y = layer(inputs)
        results.append([z.double() for z in (y, *gradients(y, layer, inputs))])
    assert all(z.isfinite().all() for z in results[1])
    for expected, found in zip(results[0][:2], results[1][:2], strict=True):
        assert relative_error([found], [expected]) < tolerance


@pytest.mark.parametrize("shift", [-30.0, 0.0, 30.0, 1e4])
def test_mamba_with_tiny_and_huge_steps(shift):
    """Δ from 1e-13 (nothing is forgotten or written) to 1e4 (all is): finite, and near float64."""
    layer, x = example("mamba", T=300)
    with torch.no_grad():
        layer.dt_bias.fill_(shift)
    compare_with_float64(layer, x)


@pytest.mark.parametrize("decay", [-20.0, -5.0, 3.0, 15.0])
@pytest.mark.parametrize("loud", [1.0, 1000.0])
def test_rwkv_at_both_ends_of_decay(decay, loud):
    """e^w from 1 − 2e-9 to 0, keys far beyond what exp can hold: finite, and near float64."""
    layer, x = example("rwkv", T=300)
    with torch.no_grad():
        layer.decay.fill_(decay)
        layer.key.weight.mul_(loud)
    compare_with_float64(layer, x, 1e-4 if loud == 1 else 1e-2)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_long_and_loud(name):
    """20,000 tokens, some of them 1,000 times too loud: finite in float32, and near float64."""
    layer, x = example(name, T=20_000, B=1)
    x[:, ::97] *= 1000
    expected = layer(x)
    y = layer.float()(x.float())
    assert y.isfinite().all()
    assert relative_error([y.double()], [expected]) < 1e-3


def test_wkv_is_right_where_exponentials_overflow():
    """A key of 1,000 wins until it has faded below the next: first, second, then by hand."""
    k = torch.tensor([1000.0, -1000.0, 0.0, 999.0]).view(4, 1, 1)
    v = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1, 1)
    start = torch.zeros(1, 2, 1), torch.full((1, 1), -torch.inf)
    y, _, largest = rwkv.wkv(k, v, torch.zeros(1), torch.zeros(1), *start)  # w = −1
    share = 1 / (1 + torch.tensor(1.0).exp().item() ** -1)  # exponents 1000 − 2 and 999: one apart
    expected = torch.tensor([1.0, 1.0, 1.0, 4 * share + 1 * (1 - share)]).view(4, 1, 1)
    torch.testing.assert_close(y, expected)
    assert largest.item() == 999


def test_wkv_with_a_first_that_exp_cannot_hold():
    """e^100 overflows float32. With it a token outweighs all before; with e^−100 it is nothing beside them."""
    k, v = torch.zeros(3, 1, 2), torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1).expand(3, 1, 2)
    start = torch.zeros(1, 2, 2), torch.full((1, 2), -torch.inf)
    y, _, _ = rwkv.wkv(k, v, torch.full((2,), -20.0), torch.tensor([100.0, -100.0]), *start)  # w = −2e-9
    torch.testing.assert_close(y[:, 0], torch.tensor([[1.0, 1.0], [2.0, 1.0], [4.0, 1.5]]))


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_autocast_keeps_float32_states(name):
    layer, x = example(name)
    layer = layer.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = layer(x.float(), return_state=True)
        y, state = layer(x.float(), state, return_state=True)
    assert y.isfinite().all()
    assert state[1].dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_layer_in_half_precision_keeps_float32_states(name):
    """Sums that go on for thousands of tokens; the result is as far off as its inputs and outputs are rounded."""
    layer, x = example(name)
    expected = layer(x)
    y, state = layer.bfloat16()(x.bfloat16(), return_state=True)
    assert y.dtype == torch.bfloat16 and state[1].dtype == torch.float32
    assert relative_error([y.double()], [expected]) < 0.03


@torch.no_grad()
def test_autocast_does_not_reach_the_selective_scan():
    """Its products with the state are those of float32, bit by bit."""
    u, dt = torch.rand(2, 40, 3, 8)
    write, read = torch.rand(2, 40, 3, 5)
    inputs = u, dt, -torch.rand(5, 8), write, read, torch.rand(3, 5, 8)
    expected = mamba.selective_scan(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = mamba.selective_scan(*inputs)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_layer_is_the_plain_one(name):
    layer, x = example(name)
    compiled = torch.compile(layer, backend="aot_eager")
    for ours, theirs in zip(gradients(compiled(x), layer, x), gradients(layer(x), layer, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


# How they start
def test_starts_outlive_a_models_own():
    """Linear layers drawn anew, as LanguageModel does: decays, Δ and mixes stay as the two papers start them."""

    def redraw(module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            assert module.bias is None

    layer = make_layer("mamba", 64).apply(redraw)
    dt = nn.functional.softplus(layer.dt_bias)
    assert 0.001 * 0.999 < dt.min() < 0.003
    assert 0.03 < dt.max() < 0.1 * 1.001
    assert layer.dt_weight.abs().max() <= 0.5
    assert layer.dt_weight.std() > 0.2
    torch.testing.assert_close(-layer.A_log.exp()[:, 7], -torch.arange(1.0, 17))
    assert (layer.skip == 1).all()
    for number, (middle, top) in enumerate([(-5 + 8 * 0.5**0.7, 1.0), (-5 + 8 * 0.5**2, 1.3)]):
        layer = rwkv.RWKV(65, number, layers=2).apply(redraw)
        assert layer.decay[0] == -5
        assert layer.decay[-1] == 3
        assert abs(layer.decay[32] - middle) < 1e-4
        torch.testing.assert_close(layer.first[:3], torch.tensor([0.3] * 3).log() + torch.tensor([0.0, 0.5, -0.5]))
        torch.testing.assert_close(layer.mix_v[64].item(), (64 / 65) ** (1 - number / 2) + top - 1)


# In the model of 03
@torch.no_grad()
def test_blocks_are_put_together_as_written():
    """x + Mamba(RMSNorm(x)); x + RWKV(LayerNorm(x)), then x + LayerNorm(x). Norms by hand, mixers by their loops."""

    def layer_norm(x, norm):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias

    torch.manual_seed(0)
    config = model.ModelConfig(("mamba", "rwkv"), 20, 12, norm="layer", mlp=0)
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    blocks = mamba.MambaBlock(config, 0).double(), rwkv.RWKVBlock(config, 1).double()
    for block in blocks:
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    first, second = blocks
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * first.norm1.weight
    torch.testing.assert_close(first(x), x + mamba.mamba_loop(first.mixer, normed))
    y = x + rwkv.rwkv_loop(second.mixer, layer_norm(x, second.norm1))
    torch.testing.assert_close(second(x), y + layer_norm(y, second.norm2))


TOKENS = torch.randint(20, (2, 25), generator=torch.Generator().manual_seed(0))
POSITIONS = torch.tensor([[3, 24, 0], [7, 8, 20]])


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_models_decode_what_they_see_at_once(name):
    language_model = model.small_model(name)
    whole = language_model(TOKENS)
    states = None
    for t in range(25):
        logits, states = language_model.step(TOKENS[:, t], states)
        torch.testing.assert_close(logits, whole[:, t], rtol=1e-8, atol=1e-10)
    assert states.length == 25
    _, states = language_model.prefill(TOKENS[:, :9])
    logits, _ = language_model.prefill(TOKENS[:, 9:], states)
    torch.testing.assert_close(logits, whole[:, -1], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_models_give_logits_at_a_few_places(name):
    """Rows of all logits, with their gradients."""
    language_model = model.small_model(name)
    results = []
    for logits in (language_model.logits_at(TOKENS, POSITIONS), model.rows(language_model(TOKENS), POSITIONS)):
        results.append([logits, *torch.autograd.grad(logits.square().sum(), list(language_model.parameters()))])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    "name, seq_len, counts",
    [
        ("rwkv", 1024, (623_872, 1_313_280, 2_888_704, 6_825_984)),
        ("mamba", 1024, (655_360, 1_413_120, 3_235_840, None)),
        ("mamba", 512, (None, None, None, 7_847_936)),
    ],
)
def test_published_counts(name, seq_len, counts):
    """Table 6 of the paper: counted at 1,024 positions, Mamba's last at 512."""
    for d_model, count in zip((64, 128, 256, 512), counts, strict=True):
        assert count is None or model.count_parameters(model.mqar_config(name, d_model, seq_len)) == count


def test_an_mlp_that_rwkv_has_not_is_refused():
    with pytest.raises(ValueError, match="has no MLP"):
        model.LanguageModel(model.ModelConfig(("rwkv",), 20, 12, mlp=8))


def test_the_papers_mamba_has_no_dropout_of_the_embedding(monkeypatch):
    monkeypatch.setitem(model.BLOCKS, "mamba", mamba.MambaBlock)
    assert model.mqar_config("mamba", 64, 128).dropout == 0
