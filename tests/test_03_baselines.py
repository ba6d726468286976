"""The specification of 03_baselines.py: sweeps, layers against loops, states, rows, extremes, initialisation."""
from importlib import import_module

import pytest
import torch
import torch.nn as nn

m = import_module("03_baselines")
NAMES = ["mamba", "rwkv"]


@pytest.mark.parametrize("check", m.CHECKS, ids=lambda check: check.__name__)
def test_claims_of_the_file(check):
    check()


@pytest.mark.parametrize("T", [*range(1, 18), 31, 32, 33, 100])
def test_sweeps_at_every_length(T):
    """Both directions, and the running maximum, against loops."""
    a, h = torch.rand(T, 2, 1, 3, dtype=torch.float64), torch.randn(T + 1, 2, 4, 3, dtype=torch.float64)
    forward, back, largest = h.clone(), h.clone(), h.clone()
    for t in range(T):
        forward[t + 1] += a[t] * forward[t]
        largest[t + 1] = torch.maximum(largest[t + 1], a[t] + largest[t])
        back[T - 1 - t] += a[T - 1 - t] * back[T - t]
    found = [h.clone() for _ in range(3)]
    m.sweep(a, found[0])
    m.sweep_back(a, found[1])
    m.sweep(a, found[2], torch.add, m.max_plus)
    for ours, theirs in zip(found, (forward, back, largest), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("T, B, d_model", [(1, 1, 1), (1, 2, 8), (2, 1, 3), (16, 2, 8), (17, 1, 33), (50, 5, 4)])
def test_layer_equals_loop(name, T, B, d_model):
    layer, x = m.example(name, T, B, d_model)
    torch.testing.assert_close(layer(x)[0], m.LOOPS[name](layer, x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_groups_of_sequences_do_not_matter(name, monkeypatch):
    """Blocks of three sequences and five tokens: the same outputs and gradients as all at once."""
    layer, x = m.example(name, T=23, B=7)
    results = []
    for tokens, numbers in ((1000, 2**30), (5, 3 * 5 * 16 * 24)):
        monkeypatch.setattr(m, "TOKENS", tokens)
        monkeypatch.setattr(m, "NUMBERS", numbers // torch.get_num_threads())
        y = layer(x)[0]
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_flow_through_the_state(name):
    """Cut at 9: gradients of inputs and parameters are those of the whole."""
    layer, x = m.example(name, T=25)
    inputs, upstream = [x, *layer.parameters()], torch.randn(3, 25, 12, dtype=torch.float64)
    first, state = layer(x[:, :9], keep=True)
    parts = torch.cat([first, layer(x[:, 9:], state)[0]], 1)
    found, expected = (torch.autograd.grad(y, inputs, upstream) for y in (parts, layer(x)[0]))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_selective_scan_gradcheck():
    """Finite differences, every input and both outputs."""
    torch.manual_seed(0)
    u, h = torch.randn(19, 2, 3, dtype=torch.float64), torch.randn(2, 4, 3, dtype=torch.float64)
    write, read = torch.randn(2, 19, 2, 4, dtype=torch.float64)
    inputs = u, torch.rand_like(u), -torch.rand(4, 3, dtype=torch.float64), write, read, h
    assert torch.autograd.gradcheck(m.selective_scan, [x.requires_grad_() for x in inputs])


def test_wkv_gradcheck():
    """Finite differences: the running maximum carries no gradient, and none is missing."""
    torch.manual_seed(0)
    k, v = torch.randn(2, 11, 2, 3, dtype=torch.float64)
    decay, first = torch.randn(2, 3, dtype=torch.float64)
    h, largest = torch.rand(2, 2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (k, v, decay, first, h)]
    assert torch.autograd.gradcheck(lambda *inputs: m.wkv(*inputs, largest)[0], inputs)


@torch.no_grad()
@pytest.mark.parametrize("name, numbers", [("mamba", 19 * 24), ("rwkv", 4 * 12)])
def test_states_are_values_of_constant_size(name, numbers):
    """The same size at any T, at least float32, and usable twice."""
    layer, x = m.example(name)
    for T in (1, 2, 5, 37):
        _, state = layer(x[:, :T], keep=True)
        assert sum(part.numel() for part in state) == 3 * numbers
    kept = [part.clone() for part in state]
    once, twice = (layer(x, state)[0] for _ in range(2))
    assert torch.equal(once, twice) and all(map(torch.equal, kept, state))
    assert layer(x)[1] is None


@pytest.mark.parametrize("name", NAMES)
def test_positions_give_rows(name):
    """The rows of the whole, with their gradients."""
    layer, x = m.example(name)
    positions = torch.tensor([[3, 36, 0], [7, 8, 20], [5, 5, 1]])
    whole = layer(x)[0].gather(1, positions.unsqueeze(-1).expand(-1, -1, 12))
    some = layer(x, positions=positions)[0]
    torch.testing.assert_close(some, whole, rtol=1e-10, atol=1e-12)
    found, expected = (torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]) for y in (some, whole))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_the_future_cannot_change_the_past(name):
    layer, x = m.example(name)
    other = torch.cat([x[:, :13], x[:, 13:] + 1], 1)
    torch.testing.assert_close(layer(x)[0][:, :13], layer(other)[0][:, :13], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shift", [-30.0, 0.0, 30.0, 1e4])
def test_mamba_with_tiny_and_huge_steps(shift):
    """Δ from 1e-13 (nothing is forgotten or written) to 1e4 (all is): finite, and near float64."""
    layer, x = m.example("mamba", T=300)
    with torch.no_grad():
        layer.dt_bias.fill_(shift)
    compare_with_float64(layer, x)


@pytest.mark.parametrize("decay", [-20.0, -5.0, 3.0, 15.0])
@pytest.mark.parametrize("loud", [1.0, 1000.0])
def test_rwkv_at_both_ends_of_decay(decay, loud):
    """e^w from 1 − 2e-9 to 0, keys far beyond what exp can hold: finite, and near float64."""
    layer, x = m.example("rwkv", T=300)
    with torch.no_grad():
        layer.decay.fill_(decay)
        layer.key.weight.mul_(loud)
    compare_with_float64(layer, x, 1e-4 if loud == 1 else 1e-2)


def compare_with_float64(layer, x, tolerance=1e-4):
    """Output and gradient of x in float32: finite, and within the tolerance of float64."""
    results = []
    for dtype in (torch.float64, torch.float32):
        layer, inputs = layer.to(dtype), x.detach().to(dtype).requires_grad_()
        y = layer(inputs)[0]
        results.append([z.double() for z in (y, *torch.autograd.grad(y.sum(), [inputs, *layer.parameters()]))])
    assert all(z.isfinite().all() for z in results[1])
    for expected, found in zip(results[0][:2], results[1][:2], strict=True):
        assert m.linear_attention.distance([found], [expected]) < tolerance


def test_wkv_is_right_where_exponentials_overflow():
    """A key of 1,000 wins until it has faded below the next: first, second, then by hand."""
    k = torch.tensor([1000.0, -1000.0, 0.0, 999.0]).view(4, 1, 1)
    v = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1, 1)
    start = torch.zeros(1, 2, 1), torch.full((1, 1), -torch.inf)
    y, _, largest = m.wkv(k, v, torch.zeros(1), torch.zeros(1), *start)  # w = −1
    share = 1 / (1 + torch.tensor(1.0).exp().item() ** -1)  # exponents 1000 − 2 and 999: one apart
    expected = torch.tensor([1.0, 1.0, 1.0, 4 * share + 1 * (1 - share)]).view(4, 1, 1)
    torch.testing.assert_close(y, expected)
    assert largest.item() == 999


@torch.no_grad()
def test_autocast_keeps_float32_states():
    for name in NAMES:
        layer, x = m.example(name)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, state = layer.float()(x.float(), keep=True)
        assert y.isfinite().all() and state[1].dtype == torch.float32


def test_initialisation_outlives_a_models_own():
    """Linear layers drawn anew, as LanguageModel does: decays, Δ and mixes stay as the two papers start them."""
    def redraw(module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            assert module.bias is None

    mamba = m.Mamba(m.Shape("mamba", 64)).apply(redraw)
    dt = nn.functional.softplus(mamba.dt_bias)
    assert 0.001 * 0.999 < dt.min() < 0.003 and 0.03 < dt.max() < 0.1 * 1.001
    assert mamba.dt_weight.abs().max() <= 0.5 and mamba.dt_weight.std() > 0.2
    torch.testing.assert_close(-mamba.A_log.exp()[:, 7], -torch.arange(1.0, 17))
    assert (mamba.skip == 1).all()
    for layer, (middle, top) in enumerate([(-5 + 8 * 0.5**0.7, 1.0), (-5 + 8 * 0.5**2, 1.3)]):
        rwkv = m.RWKV(m.Shape("rwkv", 65), layer).apply(redraw)
        assert rwkv.decay[0] == -5 and rwkv.decay[-1] == 3 and abs(rwkv.decay[32] - middle) < 1e-4
        torch.testing.assert_close(rwkv.first[:3], torch.tensor([0.3] * 3).log() + torch.tensor([0.0, 0.5, -0.5]))
        torch.testing.assert_close(rwkv.mix_v[64].item(), (64 / 65) ** (1 - layer / 2) + top - 1)


def test_memory_is_linear_in_length():
    """What backward keeps of the scan: one state a block, no (T, B, 16, E)."""
    saved = []
    u = torch.rand(256, 1, 32, requires_grad=True)
    A, write = -torch.rand(16, 32), torch.rand(256, 1, 16)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        y, _ = m.selective_scan(u, torch.rand(256, 1, 32), A, write, write, torch.zeros(1, 16, 32))
    assert sum(saved) < 256 * 16 * 32 / 2
    assert len(y.grad_fn.past) == 256 // m.TOKENS


def test_main_prints_its_table(capsys, monkeypatch):
    monkeypatch.setattr(m, "LENGTHS", (8, 16, 32))
    assert m.main([]) == 0
    out = capsys.readouterr().out
    assert "mamba" in out and "rwkv, token by token" in out and "checks: 4 passed, 0 failed" in out
