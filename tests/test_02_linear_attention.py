"""The specification of 02_linear_attention.py: every form, every kernel, outputs and gradients."""

import copy
import pickle

import pytest
import torch

from rebased import EPS, kernels
from rebased import linear_attention as la

NAMES = list(kernels.KERNELS)
CHECKS = [value for name, value in vars(la).items() if name.startswith("check_") and value.__module__ == la.__name__]
CHUNK = 8
CHUNKED = pytest.param(lambda *a, **o: la.chunked_attention(*a, chunk_size=CHUNK, **o), id="chunked")
ATTENTION = pytest.param(la.attention, id="attention")
RECURRENT = pytest.param(la.recurrent_attention, id="recurrent")
FORMS = [pytest.param(la.linear_attention, id="linear"), RECURRENT, CHUNKED, ATTENTION]
WITH_STATE = [RECURRENT, CHUNKED, ATTENTION]
ALL = [pytest.param(la.quadratic_attention, id="quadratic"), *FORMS]


def positive_example(T, dtype=torch.float32, B=2, H=3, D=16, Dv=20, seed=0):
    """q, k from U(0.1, 1.1): no normaliser is near zero, whatever the kernel."""
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.rand(2, B, H, T, D, generator=generator, dtype=torch.float64) + 0.1
    v = torch.randn(B, H, T, Dv, generator=generator, dtype=torch.float64)
    return [x.to(dtype) for x in (q, k, v)]


def plain_attention(q, k, v, kernel):
    """The definition of [P 3] with Python loops: what quadratic_attention itself is held against."""
    o = torch.zeros_like(v)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                w = torch.stack([kernel.scores(q[b, h, i : i + 1], k[b, h, j : j + 1])[0, 0] for j in range(i + 1)])
                o[b, h, i] = (w.unsqueeze(-1) * v[b, h, : i + 1]).sum(0) / (w.sum() + EPS)
    return o


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_claims_of_the_file(check):
    check()


@pytest.mark.parametrize("name", NAMES)
def test_the_oracle_is_the_definition(name):
    kernel = kernels.KERNELS[name](4, heads=2).double()
    q, k, v = (x.detach() for x in la.example(kernel, T=7, B=2, H=2, Dv=3))
    torch.testing.assert_close(
        la.quadratic_attention(q, k, v, kernel), plain_attention(q, k, v, kernel), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("T", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients(name, form, T):
    """Relative 1e-9 of the quadratic form in float64, normal inputs. At T = 1 the gradients of q and k are 0 but for
    ε, so the gradients are compared as one vector."""
    kernel = kernels.KERNELS[name](8, heads=3)
    inputs = la.example(kernel, T)
    expected = la.quadratic_attention(*inputs, kernel)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad(expected, inputs, upstream)
    o = form(*inputs, kernel)
    assert la.relative_error([o], [expected]) < 1e-9
    found = torch.autograd.grad(o, inputs, upstream)
    assert la.relative_error(found, gradients) < 1e-9
    if T > 1:
        for one, other in zip(found, gradients, strict=True):
            assert la.relative_error([one], [other]) < 1e-9


@pytest.mark.parametrize("T", [1, CHUNK, 3 * CHUNK + 5])
@pytest.mark.parametrize("form", WITH_STATE)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_through_the_states(name, form, T):
    """A first part makes a state, a second goes on, and the loss looks at o and at the final state: all gradients
    (q, k, v of both parts, and of the state in between) equal those of explicit sums."""
    kernel = kernels.KERNELS[name](4, heads=2)
    q, k, v = la.example(kernel, T + 6, B=1, H=2, Dv=3)
    weight = torch.randn(1, 2, kernel.num_features, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def loss(o, state):
        return (
            (o * torch.linspace(1, 2, o.numel(), dtype=o.dtype).view_as(o)).sum()
            + (state.S * weight).sum()
            + state.z.sum()
        )

    phi = kernel.features(k)
    whole = la.State(phi.mT @ v, phi.sum(2))
    expected = torch.autograd.grad(loss(la.quadratic_attention(q, k, v, kernel)[:, :, 6:], whole), (q, k, v))
    _, state = form(q[:, :, :6], k[:, :, :6], v[:, :, :6], kernel, return_state=True)
    o, final = form(q[:, :, 6:], k[:, :, 6:], v[:, :, 6:], kernel, state=state, return_state=True)
    found = torch.autograd.grad(loss(o, final), (q, k, v))
    assert la.relative_error(found, expected) < 1e-9


@pytest.mark.parametrize("form", WITH_STATE)
@pytest.mark.parametrize("name", NAMES)
def test_float32(name, form):
    """Relative RMS below 1e-5 of float64, outputs and gradients."""
    kernel, upstream = kernels.KERNELS[name](16), torch.randn(2, 3, 300, 20)
    results = []
    for dtype in (torch.float64, torch.float32):
        inputs = [x.requires_grad_() for x in positive_example(300, dtype)]
        o = (la.quadratic_attention if dtype == torch.float64 else form)(*inputs, kernel)
        results.append([o, *torch.autograd.grad(o, inputs, upstream.to(dtype))])
    for expected, found in zip(*results, strict=True):
        assert found.dtype == torch.float32 and la.relative_error([found.double()], [expected]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ALL)
def test_half_precision_keeps_a_float32_state(form, dtype):
    """Half inputs give half outputs; sums and states stay float32, also under autocast."""
    kernel, inputs = kernels.ReBasedKernel(16), positive_example(200, dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = form(*inputs, kernel)
    exact = la.quadratic_attention(*(x.double() for x in inputs), kernel)
    assert o.dtype == dtype and la.relative_error([o.double()], [exact]) < torch.finfo(dtype).eps
    if form not in (la.quadratic_attention, la.linear_attention):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            _, state = form(*inputs, kernel, return_state=True)
        assert state.S.dtype == state.z.dtype == torch.float32


@pytest.mark.parametrize("form", WITH_STATE)
@pytest.mark.parametrize("cut", [1, 7, CHUNK, 20, 28])
def test_cut_anywhere(form, cut):
    kernel = kernels.TaylorKernel(8, heads=3)
    q, k, v = la.example(kernel, T=29)
    first, state = form(q[:, :, :cut], k[:, :, :cut], v[:, :, :cut], kernel, return_state=True)
    second, final = form(q[:, :, cut:], k[:, :, cut:], v[:, :, cut:], kernel, state=state, return_state=True)
    whole, expected = la.chunked_attention(q, k, v, kernel, return_state=True)
    assert la.relative_error([torch.cat([first, second], 2)], [whole]) < 1e-9
    assert la.relative_error(final, expected) < 1e-9 and final.S.shape == (2, 3, 1 + 8 + 36, 5)


def test_a_state_is_a_value():
    """Going on from a state does not change it: two continuations of one prefix agree."""
    kernel = kernels.ReBasedKernel(8, heads=3)
    q, k, v = (x.detach() for x in la.example(kernel, T=40))
    _, state = la.attention(q[:, :, :20], k[:, :, :20], v[:, :, :20], kernel, return_state=True)
    kept = la.State(state.S.clone(), state.z.clone())
    rest = [x[:, :, 20:] for x in (q, k, v)]
    once, twice = (
        la.attention(*rest, kernel, state=state, return_state=True)[0] for _ in range(2)
    )
    assert torch.equal(once, twice) and torch.equal(kept.S, state.S) and torch.equal(kept.z, state.z)
    for copied in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert isinstance(copied, la.State) and torch.equal(la.attention(*rest, kernel, copied), once)


def test_recurrent_step_is_one_token():
    kernel = kernels.ReBasedKernel(8, heads=3)
    q, k, v = la.example(kernel, T=5)
    state = None
    for t in range(5):
        o, state = la.recurrent_step(q[:, :, t], k[:, :, t], v[:, :, t], kernel, state)
    torch.testing.assert_close(o, la.quadratic_attention(q, k, v, kernel)[:, :, -1], rtol=1e-9, atol=0)


@pytest.mark.parametrize("form", ALL)
@pytest.mark.parametrize("name", NAMES)
def test_position_0_returns_v0(name, form):
    """ε is small beside any normaliser that occurs: float64, 80 rows."""
    kernel = kernels.KERNELS[name](16, heads=4)
    q, k, v = la.example(kernel, T=3, B=20, H=4, seed=3)
    assert (form(q, k, v, kernel)[:, :, 0] - v[:, :, 0]).abs().max() < 1e-4


def test_a_step_takes_one_token():
    """(B, H, T, D) is no token: taken as one, every token would see itself only."""
    with pytest.raises(ValueError, match="q must be one token"):
        la.recurrent_step(*(torch.rand(shape) for shape in GOOD.values()), kernels.ReBasedKernel(8))


def test_strided_inputs():
    """Transposed views, as a model makes them, and a time axis with a step."""
    kernel = kernels.ReBasedKernel(8)
    q, k, v = (torch.rand(2, 60, 3, size, dtype=torch.float64).transpose(1, 2)[:, :, ::2] for size in (8, 8, 5))
    expected = la.quadratic_attention(q.contiguous(), k.contiguous(), v.contiguous(), kernel)
    for o in (la.attention(q, k, v, kernel), la.chunked_attention(q, k, v, kernel, chunk_size=7)):
        torch.testing.assert_close(o, expected, rtol=1e-9, atol=1e-12)


GOOD = {"q": (2, 3, 10, 8), "k": (2, 3, 10, 8), "v": (2, 3, 10, 5)}


@pytest.mark.parametrize("form", ALL)
@pytest.mark.parametrize(
    "change",
    [
        {"q": (2, 4, 10, 8)},
        {"q": (2, 3, 10, 7), "k": (2, 3, 10, 7)},
        {"k": (2, 3, 10, 7)},
        {"v": (2, 3, 11, 5)},
        {"k": (1, 3, 10, 8)},
        {"q": (2, 3, 0, 8), "k": (2, 3, 0, 8), "v": (2, 3, 0, 5)},
        {"q": (2, 3, 10, 0), "k": (2, 3, 10, 0)},
        {"v": (2, 3, 10, 0)},
        {"q": (2, 10, 8), "k": (2, 10, 8), "v": (2, 10, 5)},
        {"q": (2, 3, 9, 8)},
        {"q": ()},
        {"v": ()},
    ],
)
def test_wrong_shapes_are_named(form, change):
    inputs = [torch.rand(shape) for shape in (GOOD | change).values()]
    with pytest.raises(ValueError) as error:
        form(*inputs, kernels.ReBasedKernel(8))
    assert len(str(error.value).splitlines()) <= 2 and "got" in str(error.value) or "disagree" in str(error.value)


@pytest.mark.parametrize("form", ALL)
@pytest.mark.parametrize("bad", [torch.ones(2, 3, 10, 8, dtype=torch.int64), None, [1.0]])
def test_wrong_types_are_named(form, bad):
    q, k, v = (torch.rand(shape) for shape in GOOD.values())
    for inputs in ((bad, k, v), (q, bad, v), (q, k, bad)):
        with pytest.raises(TypeError, match="floating-point tensor"):
            form(*inputs, kernels.ReBasedKernel(8))


@pytest.mark.parametrize("size", [0, -3, 2.5, "8"])
def test_wrong_chunk_sizes_are_named(size):
    with pytest.raises(ValueError, match="chunk_size must be a positive integer"):
        la.chunked_attention(*(torch.rand(shape) for shape in GOOD.values()), kernels.ReBasedKernel(8), chunk_size=size)


@pytest.mark.parametrize("form", WITH_STATE)
def test_wrong_states_are_named(form):
    inputs = [torch.rand(shape) for shape in GOOD.values()]
    for S, z in (((2, 3, 35, 5), (2, 3, 36)), ((2, 3, 36, 4), (2, 3, 36)), ((2, 3, 36, 5), (2, 1, 36))):
        with pytest.raises(ValueError, match="state must be"):
            form(*inputs, kernels.ReBasedKernel(8), state=la.State(torch.zeros(S), torch.zeros(z)))
    with pytest.raises(TypeError, match="state must be"):
        form(*inputs, kernels.ReBasedKernel(8), state=(torch.zeros(1), torch.zeros(1)))


@pytest.mark.parametrize("form", ALL)
@pytest.mark.parametrize("name", ["based", "rebased", "elementwise"])
def test_a_floor_set_after_training_is_heeded(name, form):
    """Every form follows `kernel.floor`, up and down."""
    kernel = kernels.KERNELS[name](8, heads=3)
    inputs = la.example(kernel, T=20)
    for floor in (0.0, 0.7):
        kernel.floor = floor
        scores = kernels.KERNELS[name](8, floor=floor).scores(*inputs[:2]).tril()  # another kernel, built so
        expected = scores @ inputs[2] / scores.sum(-1, keepdim=True)
        assert la.relative_error([form(*inputs, kernel)], [expected]) < 1e-9


def test_the_costs_that_are_predicted():
    """Four times the tokens: 16 times the operations of the quadratic form, 4 times those of the others."""
    for form, ratio in (("quadratic", 16), ("linear", 4), ("recurrent", 4), ("chunked", 4)):
        few, many = (la.predicted_cost(form, T)[0] for T in (16_384, 65_536))
        assert many / few == pytest.approx(ratio, rel=0.02), form
    speed = (1e11, 1e10, 5e-6)  # operations/s, bytes/s, seconds of a call
    bound = {form: la.predicted_seconds(form, 8192, speed)[1] for form in ("quadratic", "linear", "recurrent")}
    assert bound == {"quadratic": "memory", "linear": "memory", "recurrent": "calls"}


def at_the_lowest_point(T, angle, lowest, seed=0):
    """q, k (1, 1, T, 16) with s = q·k/√D near `lowest` up to some `angle`, and v with |v| <= 4: float64."""
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 1, 1, T, 16, generator=generator, dtype=torch.float64)
    q[..., 8:] *= angle
    k[..., :8] *= angle
    q[..., 0] = 4
    k[..., 0] += lowest
    turn = torch.linalg.qr(torch.randn(16, 16, generator=generator, dtype=torch.float64)).Q
    v = torch.randn(1, 1, T, 32, generator=generator, dtype=torch.float64).clamp(-4, 4)
    return q @ turn, k @ turn, v


OFF = {1e-2: 0.03, 1e-3: 0.6, 1e-4: 1.0, 1e-5: 1.0}  # angle: the largest relative error that 01 leaves


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["x2", "based_no_floor"])
def test_rows_whose_weights_are_all_nearly_0(name, form):
    """float32: a mean of values, gradients no larger than the true ones; how far off, as 01 says.

    Sums that are carried token by token collect roundings of their own: fewer tokens there.
    """
    kernel = kernels.KERNELS[name](16)
    lowest, _ = kernels.lowest_point(kernel.scores)
    T = 200 if form is la.recurrent_attention else 600
    for angle, bound in OFF.items():
        exact = [x.requires_grad_() for x in at_the_lowest_point(T, angle, lowest)]
        expected = la.quadratic_attention(*exact, kernel)
        largest = max(g.abs().max() for g in torch.autograd.grad(expected.sum(), exact))
        inputs = [x.detach().float().requires_grad_() for x in exact]
        o = form(*inputs, kernel)
        found = max(g.abs().max() for g in torch.autograd.grad(o.sum(), inputs))
        assert o.abs().max() <= 1.25 * exact[2].abs().max(), f"{angle}: {o.abs().max():.1e}"
        assert found <= 1.5 * largest, f"{angle}: a gradient of {found:.1e}, the true ones up to {largest:.1e}"
        assert la.relative_error([o.double()], [expected]) < bound


@pytest.mark.parametrize("form", ALL)
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_weights_beyond_float32_give_0_or_no_number(form, size):
    """As 01 says: never a finite number that is not 0."""
    for name in NAMES:
        q, k, v = positive_example(20, Dv=3)
        o = form(1e30 * q, 1e30 * k, size * v, kernels.KERNELS[name](16))
        assert not (o.isfinite() & (o != 0)).any(), name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rebased", "based"])
def test_a_million_tokens_in_pieces(name):
    """65,536 tokens at a time, float32 against float64: the last piece within 1e-5; the state never grows."""
    kernel, piece = kernels.KERNELS[name](16), 65_536
    generator, states = torch.Generator().manual_seed(0), {torch.float32: None, torch.float64: None}
    for _ in range(16):
        q, k = torch.rand(2, 1, 1, piece, 16, generator=generator, dtype=torch.float64) + 0.1
        v = torch.randn(1, 1, piece, 8, generator=generator, dtype=torch.float64) + 1
        outputs = {}
        for dtype, state in states.items():
            inputs = (x.to(dtype) for x in (q, k, v))
            outputs[dtype], states[dtype] = la.attention(*inputs, kernel, state, return_state=True)
            assert states[dtype].S.shape == (1, 1, kernel.num_features, 8)
    assert la.relative_error([outputs[torch.float32].double()], [outputs[torch.float64]]) < 1e-5


@pytest.mark.slow
def test_twenty_thousand_steps():
    """The recurrence, float32 against float64, within 1e-5 over the last thousand tokens."""
    kernel = kernels.ReBasedKernel(16)
    exact = positive_example(20_000, torch.float64, B=1, H=1, Dv=8)
    with torch.no_grad():
        o = la.recurrent_attention(*(x.float() for x in exact), kernel)
    expected = la.attention(*exact, kernel)
    assert la.relative_error([o[:, :, -1000:].double()], [expected[:, :, -1000:]]) < 1e-5


@pytest.mark.parametrize("form", ALL)
def test_where_nothing_weighs_anything_the_output_is_0(form):
    """0/(0 + ε), no NaN; and where it does again, the mean of that."""
    kernel = kernels.KERNELS["x2"](4)
    q, k = torch.zeros(2, 1, 2, 9, 4, dtype=torch.float64)
    v = torch.randn(1, 2, 9, 3, dtype=torch.float64)
    assert torch.equal(form(q, k, v, kernel), torch.zeros_like(v))
    q[:, :, 8], k[:, :, 6:] = 1.0, 1.0
    found = form(q, k, v, kernel)
    assert torch.equal(found[:, :, :8], torch.zeros_like(v[:, :, :8]))
    torch.testing.assert_close(found[:, :, 8], v[:, :, 6:].mean(2))


@pytest.mark.parametrize("form", ALL)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_input_in_float64_makes_the_sums_so(form, place):
    """o comes in the type of v; a float32 o is right to its last digits."""
    kernel = kernels.ReBasedKernel(16)
    inputs = positive_example(60)
    inputs[place] = inputs[place].double() + 1e-9
    expected = la.quadratic_attention(*(x.double() for x in inputs), kernel)
    found = form(*inputs, kernel)
    assert found.dtype == inputs[2].dtype
    assert la.relative_error([found.double()], [expected]) < (1e-9 if place == 2 else 1e-7)


def test_predicted_seconds_by_hand():
    """Arithmetic and memory of four heads, calls once; the largest part is named."""
    flops, moved, calls = la.predicted_cost("recurrent", 1000)
    parts = {"arithmetic": 4 * flops / 1e9, "memory": 4 * moved / 1e12, "calls": calls * 1e-9}
    seconds, bound = la.predicted_seconds("recurrent", 1000, (1e9, 1e12, 1e-9))
    assert bound == "arithmetic" and seconds == pytest.approx(sum(parts.values()))
    seconds, bound = la.predicted_seconds("recurrent", 1000, (1e15, 1e15, 1e-3))
    assert bound == "calls" and seconds == pytest.approx(calls * 1e-3, rel=1e-3)


def test_what_would_take_long_is_left_out():
    """Over two seconds by the length before it (16 times, or 4), or over 2 GB."""
    assert la.fits("quadratic", 512, 0.12) and not la.fits("quadratic", 512, 0.13)
    assert la.fits("recurrent", 512, 0.49) and not la.fits("recurrent", 512, 0.51)
    assert la.fits("chunked", 2**20, None) and not la.fits("quadratic", 8192, None)


def test_the_reading_of_the_times(capsys):
    """Quadratic takes 30 times as long as chunked at 512; from 128 to 512 chunked takes 2 times as long."""
    measured = {("softmax", 512): 0.8, ("quadratic", 128): 0.1, ("quadratic", 512): 6.0, ("linear", 512): 1.0,
                ("recurrent", 512): 0.4, ("chunked", 128): 0.1, ("chunked", 512): 0.2}
    predicted = {("quadratic", 512): 3.0, ("chunked", 512): 0.8, ("linear", 512): 1.0, ("linear", 2048): 9.0}
    la.read_times(measured, predicted)
    shown = capsys.readouterr().out
    for form, ratio in (("softmax", "4.0"), ("quadratic", "30.0"), ("linear", "5.0"), ("recurrent", "2.0")):
        assert f"At T = 512 {form} takes {ratio} times as long" in shown
    assert "Four times the tokens take the chunked form 2.0 times as long" in shown
    assert "Measured over predicted: from 0.25 to 2.0." in shown
