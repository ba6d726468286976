"""The specification of rebased/chunked_cpu.py at its own door, (q, k, v, coefficients, S, z) -> o, S, z: held against
two loops that are written here, and what nobody sees from outside: parts, heads, threads, chunks, kept bytes, FLOPs."""

import functools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from experiments.benchmark_cpu import kept_bytes
from rebased import EPS, chunked_cpu
from rebased.chunked_cpu import chunked_attention

REBASED = (0.0, 0.0, 1.0)
BASED = (1.0, 1.0, 0.5)
COEFFICIENTS = {
    "rebased": REBASED,
    "rebased with a floor": (0.3, 0.0, 1.0),
    "based": BASED,
    "based without its floor": (0.5, 1.0, 0.5),
    "based with another floor": (0.75, 1.0, 0.5),
    "no constant": (0.0, 1.0, 0.5),
    "any": (0.2, 0.7, 3.0),
    "features": None,
}
CHUNK = 4


def tensors(D, T, B=2, H=2, Dv=3, seed=0):
    """q, k (B, H, T, D) from U(0.1, 1.1), so that no normaliser is near 0, and v, as leaves."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.rand(B, H, T, D, generator=generator, dtype=torch.float64) + 0.1
    k = torch.rand(B, H, T, D, generator=generator, dtype=torch.float64) + 0.1
    v = torch.randn(B, H, T, Dv, generator=generator, dtype=torch.float64)
    return [x.requires_grad_() for x in (q, k, v)]


def state(coefficients, D, B=2, H=2, Dv=3):
    """A state as six earlier tokens leave it, in the order of 01, as leaves."""
    _, k, v = (x.detach() for x in tensors(D, 6, B, H, Dv, seed=9))
    phi = torch.stack([features(k[:, :, j], coefficients) for j in range(6)], 2)  # (B, H, 6, P)
    return [(phi.mT @ v).requires_grad_(), phi.sum(2).requires_grad_()]


def features(x, coefficients):
    """φ(x) as 01 orders it, one feature after another: x (..., D) -> (..., P)."""
    if coefficients is None:
        return x
    c0, c1, c2 = coefficients
    D = x.shape[-1]
    found = []
    if c0:
        found.append(torch.full_like(x[..., 0], math.sqrt(c0)))
    for a in range(D if c1 else 0):
        found.append(x[..., a] * math.sqrt(c1 / math.sqrt(D)))
    for a in range(D):
        for b in range(a, D):
            times = 1 if a == b else 2
            found.append(x[..., a] * x[..., b] * math.sqrt(times * c2 / D))
    return torch.stack(found, dim=-1)


def similarity(q, k, coefficients):
    """sim of vectors (..., D) -> (...)."""
    if coefficients is None:
        return (q * k).sum(-1)
    c0, c1, c2 = coefficients
    s = (q * k).sum(-1) / math.sqrt(q.shape[-1])
    return c0 + c1 * s + c2 * s * s


def two_loops(q, k, v, coefficients, S=None, z=None):
    """The definition, a pair of tokens at a time, and the state after the last: o, S, z."""
    T = q.shape[2]
    outputs = []
    for i in range(T):
        num = torch.zeros_like(v[:, :, 0])
        den = torch.zeros_like(v[:, :, 0, 0])
        if S is not None:
            phi = features(q[:, :, i], coefficients)
            num = num + (phi.unsqueeze(-1) * S).sum(2)
            den = den + (phi * z).sum(-1)
        for j in range(i + 1):
            w = similarity(q[:, :, i], k[:, :, j], coefficients)
            num = num + w.unsqueeze(-1) * v[:, :, j]
            den = den + w
        outputs.append(num / (den + EPS).unsqueeze(-1))
    S = 0 if S is None else S
    z = 0 if z is None else z
    for j in range(T):
        phi = features(k[:, :, j], coefficients)
        S = S + phi.unsqueeze(-1) * v[:, :, j].unsqueeze(-2)
        z = z + phi
    return torch.stack(outputs, dim=2), S, z


def in_chunks(*inputs, chunk_size=CHUNK):
    return chunked_attention(*inputs, return_state=True, chunk_size=chunk_size)


def results(form, q, k, v, coefficients, *states):
    """o, S, z, and the gradients of all inputs as one vector (at T = 1 those of q and k are 0 but for EPS)."""
    o, S, z = form(q, k, v, coefficients, *states)
    loss = o.sin().sum() + S.sin().sum() + z.sin().sum()
    gradients = torch.autograd.grad(loss, [q, k, v, *states])
    return [o, S, z, torch.cat([x.flatten() for x in gradients])]


def assert_equal(found, expected, tolerance=1e-9):
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert (one - other).norm() <= tolerance * other.norm()


@pytest.fixture
def threads():
    """torch.set_num_threads, set back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# Against the definition
@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("T", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 2])
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_equals_two_loops(name, T, started):
    """Outputs, the final state in the order of 01, and gradients, through the states too: within 1e-9."""
    coefficients = COEFFICIENTS[name]
    inputs = tensors(5, T)
    states = state(coefficients, 5) if started else []
    expected = results(two_loops, *inputs, coefficients, *states)
    assert_equal(results(in_chunks, *inputs, coefficients, *states), expected)


@pytest.mark.parametrize("Dv", [1, 7, 8])
@pytest.mark.parametrize("D", [1, 2, 3, 8])
@pytest.mark.parametrize("coefficients", [BASED, None])
def test_any_sizes(coefficients, D, Dv):
    inputs = tensors(D, 9, Dv=Dv)
    states = state(coefficients, D, Dv=Dv)
    expected = results(two_loops, *inputs, coefficients, *states)
    assert_equal(results(in_chunks, *inputs, coefficients, *states), expected)


@pytest.mark.parametrize("name", ["rebased", "any", "features"])
def test_gradcheck(name):
    coefficients = COEFFICIENTS[name]
    inputs = tensors(2, 5, B=1, H=2, Dv=2)
    states = state(coefficients, 2, B=1, H=2, Dv=2)

    def form(q, k, v, S, z):
        return in_chunks(q, k, v, coefficients, S, z)

    assert torch.autograd.gradcheck(form, [*inputs, *states])


@pytest.mark.parametrize("wanted", range(5))
def test_one_gradient_alone(wanted):
    """Only one of q, k, v, S, z requires grad; the loss looks at o alone, at S alone, at z alone."""
    inputs = [x.detach() for x in (*tensors(3, 9), *state(BASED, 3))]
    leaf = inputs[wanted].requires_grad_()
    for output in range(3):
        losses = []
        for form in (in_chunks, two_loops):
            found = form(*inputs[:3], BASED, *inputs[3:])[output]
            losses.append(found.sin().sum())
        if not losses[1].requires_grad:  # a state does not depend on q
            continue
        found, expected = (torch.autograd.grad(loss, leaf, allow_unused=True)[0] for loss in losses)
        if expected is None:
            assert found is None or not found.any()
        else:
            assert_equal([found], [expected])


def test_no_gradient_asked_for():
    """Without gradients no state is kept, and o is the same."""
    inputs = tensors(3, 9)
    expected = chunked_attention(*inputs, REBASED, chunk_size=CHUNK)
    with torch.no_grad():
        o = chunked_attention(*inputs, REBASED, chunk_size=CHUNK)
    assert torch.equal(o, expected) and not o.requires_grad


def test_training_after_inference_mode():
    """What is remembered from one call to the next serves both."""
    chunked_cpu.rotation_order.cache_clear()
    inputs = tensors(3, 9)
    states = state(BASED, 3)
    with torch.inference_mode():
        expected = in_chunks(*inputs, BASED, *states)
    found = results(in_chunks, *inputs, BASED, *states)
    assert_equal(found[:3], expected)


def test_strided_inputs():
    """Transposed views, as a model makes them, and a time axis with a step; a state that is a view."""
    q, k, v = (x.detach().transpose(1, 2).contiguous().transpose(1, 2)[:, :, ::2] for x in tensors(3, 18))
    S, z = (x.detach() for x in state(BASED, 3))
    expected = in_chunks(q.contiguous(), k.contiguous(), v.contiguous(), BASED, S, z)
    assert_equal(in_chunks(q, k, v, BASED, S.mT.contiguous().mT, z), expected)


@pytest.mark.parametrize("coefficients", [BASED, None])
def test_a_loss_that_looks_at_o_alone(coefficients):
    """Nothing comes from later on; o.sum() hands back a gradient of stride 0, o[..., 0].sum() one with gaps."""
    inputs = tensors(3, 9)
    for reading in (lambda o: o.sum(), lambda o: o[..., 0].sum(), lambda o: o[:, :, 3:5].sum()):
        o = chunked_attention(*inputs, coefficients, chunk_size=CHUNK)
        found = torch.autograd.grad(reading(o), inputs)
        expected = torch.autograd.grad(reading(two_loops(*inputs, coefficients)[0]), inputs)
        assert_equal(found, expected)


# States
@pytest.mark.parametrize("cut", [1, CHUNK, 7, 12])
@pytest.mark.parametrize("coefficients", [BASED, None])
def test_cut_anywhere(coefficients, cut):
    q, k, v = tensors(5, 13)
    whole = in_chunks(q, k, v, coefficients)
    first, *past = in_chunks(q[:, :, :cut], k[:, :, :cut], v[:, :, :cut], coefficients)
    second, *final = in_chunks(q[:, :, cut:], k[:, :, cut:], v[:, :, cut:], coefficients, *past)
    assert_equal([torch.cat([first, second], 2), *final], whole)


@pytest.mark.parametrize("coefficients", [BASED, None])
def test_a_state_is_a_value(coefficients):
    """Neither pass writes to the state it starts from, nor to its inputs."""
    inputs = tensors(5, 13)
    states = state(coefficients, 5)
    kept = [x.detach().clone() for x in (*inputs, *states)]
    once, twice = (results(in_chunks, *inputs, coefficients, *states) for _ in range(2))
    for one, other in zip(once, twice, strict=True):
        assert torch.equal(one, other)
    for one, other in zip((*inputs, *states), kept, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("coefficients", [BASED, None])
def test_the_operation_itself_leaves_a_state_as_it_was(coefficients):
    """Both sweeps write over their state: over a copy of what came in, S and its gradient alike."""
    q, k, v = (x.flatten(0, 1) for x in tensors(5, 13))
    S = torch.rand(4, chunked_cpu.count_features(coefficients, 5), 4, dtype=torch.float64, requires_grad=True)
    dS = torch.rand_like(S)
    kept = S.detach().clone(), dS.clone()
    o, final = chunked_cpu.ChunkedAttention.apply(q, k, v, S, coefficients, CHUNK, True)
    torch.autograd.grad([o, final], S, [torch.ones_like(o), dS])
    assert torch.equal(S, kept[0]) and torch.equal(dS, kept[1])


def test_a_state_of_another_precision():
    """A float64 state goes on in float32, and the other way round, as q says."""
    inputs = tensors(5, 9)
    states = state(BASED, 5)
    expected = in_chunks(*inputs, BASED, *states)
    for here, there in ((torch.float32, torch.float64), (torch.float64, torch.float32)):
        found = in_chunks(*(x.to(here) for x in inputs), BASED, *(x.to(there) for x in states))
        assert found[0].dtype == here
        assert_equal([x.double() for x in found], expected, tolerance=1e-5)


# Parts, heads, threads: none of them changes a number
@pytest.mark.parametrize("groups", [[(0, 9)], [(0, 5), (5, 9)], [(n, n + 1) for n in range(9)]])
@pytest.mark.parametrize("count", [1, 3])
def test_heads_in_groups_and_threads_change_nothing(groups, count, monkeypatch, threads):
    inputs = tensors(4, 14, B=3, H=3)
    expected = results(two_loops, *inputs, REBASED)
    monkeypatch.setattr(chunked_cpu, "head_groups", lambda N, device: [slice(*group) for group in groups])
    threads(count)
    assert_equal(results(in_chunks, *inputs, REBASED), expected)


@pytest.mark.parametrize("group", [1, 20, 40, 10_000])
@pytest.mark.parametrize("coefficients", [BASED, None])
def test_groups_of_chunks_change_nothing(coefficients, group, monkeypatch):
    """T = 26 in chunks of 4: one, two or all chunks a group, a rest of chunks, and a rest of two tokens."""
    inputs = tensors(3, 26, B=1, H=2)
    states = state(coefficients, 3, B=1, H=2)
    expected = results(functools.partial(in_chunks, chunk_size=26), *inputs, coefficients, *states)
    monkeypatch.setattr(chunked_cpu, "GROUP", group)
    assert_equal(results(in_chunks, *inputs, coefficients, *states), expected)


def test_head_groups_cover_every_head_once(threads):
    for count in (1, 2, 3, 7):
        threads(count)
        for N in (1, 2, 5, 16, 100):
            covered = []
            for heads in chunked_cpu.head_groups(N, torch.device("cpu")):
                covered.extend(range(N)[heads])
            assert covered == list(range(N))


@pytest.mark.parametrize("P", [16, 136, 100_000])
@pytest.mark.parametrize("N", [1, 16, 500])
def test_parts_cover_every_token_and_chunk_once(N, P):
    for T in (1, 15, 16, 17, 500, 5000):
        C = min(T, 16)
        tokens = []
        chunks = []
        for part in chunked_cpu.parts(torch.empty(N, T, 1), C, P):
            tokens.extend(range(T)[part.times])
            chunks.extend(range(math.ceil(T / C))[part.chunks])
            length = part.times.stop - part.times.start
            assert length % (part.C * part.G) == 0
            assert length // part.C == part.chunks.stop - part.chunks.start
            assert part.G == 1 or part.G * part.C * N * P <= chunked_cpu.NUMBERS * torch.get_num_threads()
        assert tokens == list(range(T))
        assert chunks == list(range(math.ceil(T / C)))


def test_chunk_choice_follows_the_cost():
    """Short sequences are one chunk; long ones are not cut to pieces, nor left quadratic."""
    for T in (20, 128, 256):
        assert chunked_cpu.best_chunk(4, T, 16, 65, 136, threads=1) == T
    one = chunked_cpu.best_chunk(4, 32_768, 16, 65, 136, threads=1)
    two = chunked_cpu.best_chunk(4, 32_768, 16, 65, 136, threads=2)
    assert 64 <= one <= two <= 256


def test_the_chunk_chosen_is_the_one_taken(monkeypatch):
    inputs = tensors(3, 40)
    expected = chunked_attention(*inputs, REBASED, chunk_size=40)
    monkeypatch.setattr(chunked_cpu, "best_chunk", lambda *sizes: 7)
    assert_equal([chunked_attention(*inputs, REBASED)], [expected])


# What it costs
def test_features_are_not_kept():
    """For the backward pass: inputs, output, 1/den and one state a chunk, whatever P·T would be."""
    T, C = 1024, 128
    inputs = [torch.rand(1, 2, T, size, requires_grad=True) for size in (16, 16, 24)]
    states = T // C * 2 * 136 * 25 * 4
    kept = kept_bytes(lambda: chunked_attention(*inputs, REBASED, chunk_size=C))
    assert kept == sum(x.nbytes for x in inputs) + inputs[2].nbytes + 4 * 2 * T + states


class Shapes(TorchDispatchMode):
    """The shapes of all tensors that are made."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.found.add(tuple(result.shape))
        return result


def test_without_gradients_no_states_are_kept():
    inputs = tensors(3, 20, B=1, H=1, Dv=7)
    states = (20 // CHUNK, 1, 6, 8)  # (chunks, N, P, V)
    for needed in (True, False):
        with Shapes() as shapes:
            chunked_attention(*(x.detach().requires_grad_(needed) for x in inputs), REBASED, chunk_size=CHUNK)
        assert (states in shapes.found) == needed


def test_one_chunk_keeps_no_state():
    inputs = [torch.rand(1, 2, 64, size, requires_grad=True) for size in (16, 16, 24)]
    kept = kept_bytes(lambda: chunked_attention(*inputs, REBASED, chunk_size=64))
    assert kept == sum(x.nbytes for x in inputs) + inputs[2].nbytes + 4 * 2 * 64


class Products(TorchDispatchMode):
    """Counts the FLOPs of matrix products, those in place too."""

    flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "bmm" in function.overloadpacket.__name__:
            A, B = args[-2:]
            self.flops += 2 * A.numel() * B.shape[-1]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("chunks", [1, 4])
def test_handed_in_features_cost_plain_products(chunks):
    """No product with a P × P identity. Forward: u and num inside a chunk; S read by all chunks but the first, made
    of all but the last. Backward: u, du, dv, dq, dk inside; dv and dφ(k) from R, R itself, dφ(q) from S."""
    P, V, T = 500, 9, 64
    C = T // chunks
    q, k, v = tensors(P, T, B=1, H=1, Dv=V - 1)
    others = (chunks - 1) / chunks
    with Products() as forward:
        o = chunked_attention(q, k, v, None, chunk_size=C)
    assert forward.flops == 2 * T * (C * P + C * V) + 2 * T * P * V * 2 * others
    with Products() as backward:
        torch.autograd.grad(o.sum(), (q, k, v))
    through_states = 2 * T * P * V * (2 * others + 2 if chunks > 1 else 0)
    assert backward.flops == 2 * T * (3 * C * P + 2 * C * V) + through_states


# First derivatives only
def hessian_times_vector(inputs, coefficients):
    """By two calls of autograd.grad, as one writes it."""
    q = inputs[0]
    o = chunked_attention(*inputs, coefficients, chunk_size=CHUNK)
    (first,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
    torch.autograd.grad((first * torch.ones_like(q)).sum(), q)


def penalty_on_a_gradient(inputs, coefficients):
    """The gradient of o.sum(): what comes in is a constant, and `once_differentiable` would see nothing to guard."""
    o = chunked_attention(*inputs, coefficients, chunk_size=CHUNK)
    gradients = torch.autograd.grad(o.sum(), inputs, create_graph=True)
    sum(x.square().sum() for x in gradients).backward()


def gradient_through_a_state(inputs, coefficients):
    """o is not even looked at."""
    _, S, _ = chunked_attention(*inputs, coefficients, return_state=True, chunk_size=CHUNK)
    (first,) = torch.autograd.grad(S.square().sum(), inputs[1], create_graph=True)
    first.square().sum().backward()


@pytest.mark.parametrize("second", [hessian_times_vector, penalty_on_a_gradient, gradient_through_a_state])
@pytest.mark.parametrize("T", [3, 9])
@pytest.mark.parametrize("coefficients", [BASED, None])
def test_second_derivatives_are_refused(coefficients, T, second):
    with pytest.raises(RuntimeError, match="no derivative of its own.*quadratic_attention"):
        second(tensors(3, T), coefficients)


def test_first_derivatives_of_a_graph_that_is_kept():
    """create_graph=True changes no number, and retain_graph allows a second time."""
    inputs = tensors(3, 9)
    o = chunked_attention(*inputs, BASED, chunk_size=CHUNK)
    expected = torch.autograd.grad(o.sin().sum(), inputs, retain_graph=True)
    for found in (
        torch.autograd.grad(o.sin().sum(), inputs, create_graph=True),
        torch.autograd.grad(o.sin().sum(), inputs),
    ):
        assert_equal(found, expected, tolerance=0)


# Beside the rest of PyTorch
def test_checkpointing():
    """Tensors saved for the backward pass may be made again when it asks for them, once."""
    inputs = tensors(3, 9)
    form = functools.partial(chunked_attention, coefficients=BASED, chunk_size=CHUNK)
    expected = torch.autograd.grad(form(*inputs).sin().sum(), inputs)
    o = checkpoint(form, *inputs, use_reentrant=False)
    assert_equal(torch.autograd.grad(o.sin().sum(), inputs), expected)


def test_autocast_stays_outside():
    """Both passes keep their float32 although autocast is on; called inside of it or not."""
    inputs = [x.detach().float().requires_grad_() for x in tensors(8, 30)]
    o = chunked_attention(*inputs, BASED, chunk_size=CHUNK)
    expected = [o, *torch.autograd.grad(o.sin().sum(), inputs)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = chunked_attention(*inputs, BASED, chunk_size=CHUNK)
        found = [o, *torch.autograd.grad(o.sin().sum(), inputs)]
    assert_equal(found, expected, tolerance=0)


def test_a_compiled_caller():
    """torch.compile leaves the operation as it is, and does not unroll its chunks."""
    inputs = tensors(3, 9)
    graphs = []

    def backend(graph, _):
        graphs.append(graph.code)
        return graph.forward

    def caller(q, k, v):
        return chunked_attention(2 * q, k, v, BASED, chunk_size=CHUNK).sin().sum()

    expected = torch.autograd.grad(caller(*inputs), inputs)
    found = torch.autograd.grad(torch.compile(caller, backend=backend)(*inputs), inputs)
    assert_equal(found, expected)
    code = "".join(graphs)
    assert "sin" in code and "bmm" not in code and "chunked_cpu" not in code
