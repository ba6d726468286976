"""The specification of rebased/triton_kernels.py: interpreted, on a GPU if there is one, compiled.

How they are launched on six cards that are not there is in test_triton_kernels_launches.py.

A process in which TRITON_INTERPRET is set cannot compile, and Triton reads it when it is imported. So the tests that
run kernels skip themselves in an ordinary process without a GPU, and one test runs them all, and those of the
benchmark, in a process of their own.
"""

import contextlib
import importlib.util
import inspect
import math
import mmap
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: the GPU kernels cannot be tested")
from experiments import benchmark_gpu as benchmark
from rebased import kernels
from rebased import linear_attention as la
from rebased import triton_kernels as gpu

ROOT = Path(__file__).resolve().parent.parent
runs = pytest.mark.skipif(not benchmark.CAN_RUN, reason="no GPU; test_in_the_interpreter runs it")
on_a_card = pytest.mark.skipif(benchmark.DEVICE != "cuda", reason="needs a GPU")
interprets = pytest.mark.skipif(not gpu.INTERPRETED, reason="needs the interpreter; test_in_the_interpreter runs it")
compiles = pytest.mark.skipif(gpu.INTERPRETED, reason="the interpreter's process cannot compile")
BASED = (1.0, 1.0, 0.5)
REBASED = (0.0, 0.0, 1.0)
KERNELS = {"rebased": kernels.ReBasedKernel(16), "based": kernels.TaylorKernel(16)}
BACKEND = "inductor" if torch.cuda.is_available() else "aot_eager"


def interpret(*arguments):
    """Run tests, or another command, in a process in which Triton interprets -> exit status, output."""
    command = [sys.executable, *arguments]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@compiles
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_in_the_interpreter(which):
    here = Path(__file__)
    tests = [str(here), str(here.with_name("test_benchmark_gpu.py"))]
    code, text = interpret("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", which, *tests)
    assert code == 0 and "passed" in text, text


def inputs_of(D, T, **options):
    """q, k, v as leaves and an upstream gradient, as the benchmark makes them."""
    return benchmark.make_inputs(D, T, **options)


def values_and_gradients(form, inputs, upstream):
    """[o, dq, dk, dv]."""
    o = form(*inputs)
    return [o, *torch.autograd.grad(o, inputs, upstream)]


def same_bits(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# Beside each kernel a few lines of PyTorch: they are equal, segment by segment
def test_the_table_gives_the_features_number_by_number():
    x = torch.randn(1, 3, 7, dtype=torch.float64)
    for kernel in (kernels.ReBasedKernel(7), kernels.TaylorKernel(7), kernels.ReBasedKernel(7, floor=0.5)):
        table = gpu.make_table(kernel.coefficients, 7, torch.device("cpu")).double()
        found = gpu.features_reference(x, table)
        assert torch.allclose(found[..., : kernel.num_features], kernel.features(x))
        assert not found[..., kernel.num_features :].any() and found.shape[-1] % gpu.BLOCK_F.value == 0


def test_the_gradient_of_the_table_is_that_of_autograd():
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    table = gpu.make_table(BASED, 7, torch.device("cpu")).double()
    phi = gpu.features_reference(x, table)
    dphi = torch.randn_like(phi)
    found = gpu.features_backward_reference(x, dphi, table)
    assert torch.allclose(found, torch.autograd.grad(phi, x, dphi)[0])


def test_the_references_make_nothing_on_another_device():
    """On "meta", which has shapes only: an index made on the CPU would be refused there, as on a GPU."""
    x = torch.empty(2, 3, 7, device="meta")
    table = gpu.make_table(BASED, 7, torch.device("meta"))
    phi = gpu.features_reference(x, table)
    assert gpu.features_backward_reference(x, phi, table).shape == x.shape


def test_a_table_stays_where_it_is():
    """A CUDA graph reads it as long as the graph lives, whatever other tables were made since."""
    first = gpu.make_table(REBASED, 3, torch.device("cpu"))
    for number in range(200):
        gpu.make_table((number / 100, 0.0, 1.0), 1, torch.device("cpu"))
    assert gpu.make_table(REBASED, 3, torch.device("cpu")) is first


class OneRun:
    """All five kernels on N = 2 heads of T = 150 tokens in segments of 64, with a state at both ends, in float32."""

    def __init__(self, coefficients, T=150, D=7, DV=5):
        generator = torch.Generator().manual_seed(0)
        self.coefficients = coefficients
        self.q, self.k = (torch.rand(2, 2, T, D, generator=generator) + 0.1).to(benchmark.DEVICE)
        self.v, self.do = torch.randn(2, 2, T, DV, generator=generator).to(benchmark.DEVICE)
        self.table = gpu.make_table(coefficients, D, self.q.device)
        features = (self.table[2] > 0)[:, None]  # padding is 0
        sizes = (2, self.table.shape[1], DV + 1)
        self.first = torch.rand(sizes, generator=generator).to(self.q.device) * features  # the state before all tokens
        self.last = torch.rand(sizes, generator=generator).to(self.q.device) * features  # gradient of the final one

    def pack(self, state):
        """(N, P_PAD, DV + 1) -> (N, STATE), as it lies in a slot."""
        return torch.cat([state[..., :-1].flatten(1), state[..., -1]], dim=1)

    def unpack(self, slots):
        """(N, slots, STATE) -> (N, slots, P_PAD, DV + 1)."""
        P_PAD = self.table.shape[1]
        S = slots[..., :-P_PAD].unflatten(-1, (P_PAD, -1))
        return torch.cat([S, slots[..., -P_PAD:].unsqueeze(-1)], dim=-1)

    def parts(self, *tensors):
        """The segments of tensors (N, T, size), as a list of tuples."""
        return list(zip(*(x.split(64, 1) for x in tensors), strict=True))


def close(found, expected):
    return la.relative_error([found], [expected]) < 1e-5


@runs
@pytest.mark.parametrize("coefficients", [
    pytest.param(REBASED, id="rebased", marks=pytest.mark.slow), pytest.param(BASED, id="based"),
])
def test_each_kernel_equals_its_reference(coefficients):
    run = OneRun(coefficients)
    q, k, v, do, table = run.q, run.k, run.v, run.do, run.table
    rest = coefficients, 64
    o, low, inv_den, states, _ = gpu.empty_outputs(q, k, v, run.first, table, *rest, True)
    gpu.launch_states(k, v, inv_den, inv_den, table, states, run.pack(run.first), *rest, reverse=False)
    before = [run.first]  # the state kernel and the scan, in PyTorch
    for k_s, v_s in run.parts(k, v):
        before.append(gpu.state_reference(k_s, v_s, torch.ones_like(v_s[..., :1]), table))
    before = gpu.scan_reference(torch.stack(before, 1))  # (N, slots, P_PAD, DV + 1)
    assert close(run.unpack(states), before)

    gpu.launch_tiles(gpu.output_kernel, (q, k, v, o, low, inv_den), table, states, 0, *rest)
    found = [gpu.output_reference(*x, before[:, s], table, coefficients) for s, x in enumerate(run.parts(q, k, v))]
    expected_o = torch.cat([x[0] for x in found], 1)
    expected_inv = torch.cat([x[1] for x in found], 1)
    assert close(o, expected_o) and close(inv_den, expected_inv[..., 0])

    dq, dk, dv, delta = (torch.empty_like(x) for x in (q, k, v, inv_den))
    gpu.launch_tiles(gpu.query_kernel, (q, k, v, do, o, low, dq, inv_den, delta), table, states, 0, *rest)
    tensors = run.parts(q, k, v, do, expected_o, expected_inv)
    found = [gpu.query_reference(*x, before[:, s], table, coefficients) for s, x in enumerate(tensors)]
    expected_delta = torch.cat([x[1] for x in found], 1)
    assert close(dq, torch.cat([x[0] for x in found], 1)) and close(delta, expected_delta[..., 0])

    R = torch.empty_like(states)
    gpu.launch_states(q, do, inv_den, delta, table, R, run.pack(run.last), *rest, reverse=True)
    after = [run.last]
    for q_s, do_s, inv_s, delta_s in reversed(run.parts(q, do, expected_inv, expected_delta)):
        after.append(gpu.state_reference(q_s, do_s * inv_s, -delta_s * inv_s, table))
    after = gpu.scan_reference(torch.stack(after, 1))
    assert close(run.unpack(R), after)

    gpu.launch_tiles(gpu.key_kernel, (q, k, v, do, dk, dv, inv_den, delta), table, R, 0, *rest)
    tensors = run.parts(q, k, v, do, expected_inv, expected_delta)
    found = [gpu.key_reference(*x, after[:, 2 - s], table, coefficients) for s, x in enumerate(tensors)]
    assert close(dk, torch.cat([x[0] for x in found], 1)) and close(dv, torch.cat([x[1] for x in found], 1))


@runs
def test_the_scan_of_more_slots_and_numbers_than_a_program_takes_at_a_time():
    states = torch.rand(2, 40, 300, device=benchmark.DEVICE)
    expected = gpu.scan_reference(states)
    gpu.scan_kernel[(2 * 2,)](states, 40, STATE=300, ROWS=gpu.ROWS, COLUMNS=gpu.COLUMNS)
    assert close(states, expected)


# All of them together: the definition
@runs
def test_gradients_come_in_the_types_of_the_inputs():
    *inputs, upstream = inputs_of(4, 20, dtypes=(torch.float32, torch.float16))
    o, *gradients = values_and_gradients(partial(gpu.chunked_attention, coefficients=BASED), inputs, upstream)
    assert [x.dtype for x in (o, *gradients)] == [torch.float16, torch.float32, torch.float32, torch.float16]


@runs
@pytest.mark.parametrize("type_name", benchmark.TYPES)
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("T", [1, 31, 64, 65, pytest.param(600, marks=pytest.mark.slow)])
def test_equals_the_definition(T, name, type_name):
    found = benchmark.errors(KERNELS[name], T, type_name, H=2 if T == 65 else 1)
    assert not benchmark.too_large(found, type_name), found


@runs
def test_what_rounding_takes_from_o_is_given_back():
    """Values that differ in their last bit: so do do·v and δ, and an o rounded to half would make noise of dq."""
    q, k, v, upstream = inputs_of(8, 40, dtypes=(torch.float16, torch.float16))
    v = (1 + (v > 0).half() * 2**-10).detach().requires_grad_()
    exact = benchmark.as_double([q, k, v])
    o = la.quadratic_attention(*exact, kernels.ReBasedKernel(8))
    wanted = torch.autograd.grad(o, exact[:2], upstream.double())
    found = torch.autograd.grad(gpu.chunked_attention(q, k, v, REBASED), (q, k), upstream)
    assert la.relative_error([found[0].double()], wanted[:1]) < 0.05  # 9 without


@runs
@pytest.mark.parametrize("D,Dv", [(1, 1), (8, 10), (7, 42), pytest.param(32, 128, marks=pytest.mark.slow)])
def test_any_size(D, Dv):
    assert max(benchmark.errors(kernels.TaylorKernel(D), 70, segment=64, Dv=Dv).values()) <= 1e-5


@runs
def test_a_floor_set_after_training():
    kernel = kernels.ReBasedKernel(4)
    for floor in (0.0, 0.5):
        kernel.floor = floor
        assert max(benchmark.errors(kernel, 70, segment=64).values()) <= 1e-5


@runs
def test_a_lowest_weight_below_0_is_computed_as_the_definition_has_it():
    kernel = kernels.TaylorKernel(4)
    kernel._floor = -0.25  # u² − 0.25, positive on these inputs; `floor` itself would refuse it
    assert kernel.coefficients == (0.25, 1.0, 0.5)
    assert max(benchmark.errors(kernel, 70, segment=64).values()) <= 1e-5


@runs
@pytest.mark.slow
def test_the_check_of_the_benchmark():
    """As above at T = 150, across segments, every type."""
    benchmark.check_equals_the_definition()


@on_a_card  # the interpreter runs one thing at a time
@pytest.mark.parametrize("type_name", benchmark.TYPES)
def test_no_bits_move_in_100_runs(type_name):
    assert benchmark.moved_bits(type_name)[0] == 0


# States
@runs
def test_three_pieces_equal_one_run_and_so_do_their_gradients():
    *inputs, upstream = inputs_of(4, 150)

    def in_pieces(*tensors):
        pieces = []
        S, z = None, None
        for start, end in ((0, 70), (70, 71), (71, 150)):
            part = [x[:, :, start:end] for x in tensors]
            o, S, z = gpu.chunked_attention(*part, REBASED, S, z, return_state=True, segment=64)
            pieces.append(o)
        return torch.cat(pieces, 2)

    whole = values_and_gradients(partial(gpu.chunked_attention, coefficients=REBASED, segment=64), inputs, upstream)
    assert la.relative_error(values_and_gradients(in_pieces, inputs, upstream), whole) < 1e-5


@runs
@pytest.mark.parametrize("T", [40, 150])
def test_gradients_through_both_states(T):
    """Against 02's chunked form in float64: initial state in, final state out, an upstream gradient on each."""
    kernel = kernels.TaylorKernel(8)
    *inputs, upstream = inputs_of(8, T)
    sizes = ((1, 1, kernel.num_features, 5), (1, 1, kernel.num_features))
    states = [torch.rand(size, device=upstream.device).requires_grad_() for size in sizes]
    upstreams = [upstream, *(torch.rand_like(x) for x in states)]
    found = gpu.chunked_attention(*inputs, kernel.coefficients, *states, return_state=True, segment=64)
    found = [*found, *torch.autograd.grad(found, [*inputs, *states], upstreams)]
    exact = benchmark.as_double([*inputs, *states])
    o, state = la.chunked_attention(*exact[:3], kernel, la.State(*exact[3:]), return_state=True)
    wanted = [o, *state]
    wanted += torch.autograd.grad(wanted, exact, [x.double() for x in upstreams])
    for a, b in zip(found, wanted, strict=True):
        assert la.relative_error([a.double()], [b]) < 1e-5


@runs
def test_only_the_state_is_used():
    kernel = kernels.ReBasedKernel(8)
    *inputs, _ = inputs_of(8, 70)
    _, S, z = gpu.chunked_attention(*inputs, REBASED, return_state=True)
    found = torch.autograd.grad(S.sum() + z.sum(), inputs[1:])
    _, state = la.chunked_attention(*inputs, kernel, return_state=True)
    assert la.relative_error(found, torch.autograd.grad(state.S.sum() + state.z.sum(), inputs[1:])) < 1e-5


@pytest.mark.parametrize("T,edge,keep,slots", [
    (1, False, False, 0), (512, False, False, 0), (512, True, False, 1), (512, False, True, 2), (513, False, False, 2),
    (1024, False, True, 3), (2**20, False, False, 2048), (2**20, True, True, 2049),
])
def test_there_are_only_the_states_that_somebody_reads(T, edge, keep, slots):
    assert gpu.count_slots(T, 512, edge, keep) == slots


@interprets
@pytest.mark.parametrize("T,with_state", [
    (40, False), (130, True), pytest.param(40, True, marks=pytest.mark.slow),
    pytest.param(130, False, marks=pytest.mark.slow),
])
def test_nothing_is_read_before_it_is_written(T, with_state):
    """Every fresh tensor is filled with NaN: none comes out, and the numbers are the same."""
    kernel = kernels.TaylorKernel(4)
    *inputs, upstream = inputs_of(4, T)
    S, z = (torch.rand(1, 1, 15, 5), torch.rand(1, 1, 15)) if with_state else (None, None)

    def form(*tensors):
        result = gpu.chunked_attention(*tensors, kernel.coefficients, S, z, return_state=with_state, segment=64)
        return torch.cat([result[0], result[1]], 2) if with_state else result

    upstream = torch.cat([upstream, torch.ones(1, 1, 15, 5)], 2) if with_state else upstream
    expected = values_and_gradients(form, inputs, upstream)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives
    try:
        assert torch.empty(9).isnan().all()
        found = values_and_gradients(form, inputs, upstream)
    finally:
        torch.use_deterministic_algorithms(False)
    assert same_bits(found, expected) and not any(x.isnan().any() for x in found)


# Memory layouts and sizes
@runs
def test_any_strides():
    q, k, v, upstream = inputs_of(8, 35, H=2)
    form = partial(gpu.chunked_attention, coefficients=REBASED)
    expected = values_and_gradients(form, (q, k, v), upstream)
    layouts = [
        lambda x: x.detach().transpose(1, 2).contiguous().transpose(1, 2),  # as a split projection lies
        lambda x: x.detach().mT.contiguous().mT,  # rows that are not contiguous
        lambda x: x.detach().repeat_interleave(2, 2)[:, :, ::2],  # every other row of a larger tensor
    ]
    for layout in layouts:
        inputs = [layout(x).requires_grad_() for x in (q, k, v)]
        assert same_bits(values_and_gradients(form, inputs, layout(upstream)), expected)
    ones = torch.ones((), device=q.device).expand_as(upstream)  # all strides 0, as from o.sum().backward()
    found, wanted = (values_and_gradients(form, (q, k, v), x) for x in (ones, ones.contiguous()))
    assert same_bits(found, wanted)


@runs
def test_two_runs_give_the_same_bits():
    *inputs, upstream = inputs_of(8, 130)
    form = partial(gpu.chunked_attention, coefficients=BASED, segment=64)
    assert same_bits(values_and_gradients(form, inputs, upstream), values_and_gradients(form, inputs, upstream))


# Offsets: only the last program runs, on memory that is never touched elsewhere
def reserve(*shape, dtype=torch.float16):
    """Zeros of any size: a page of this memory exists when it is first written."""
    size = math.prod(shape) * dtype.itemsize
    noreserve = 0x4000
    room = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | noreserve)
    return torch.frombuffer(room, dtype=dtype).view(shape)


def run_last_program(monkeypatch, kernel, programs, *arguments, **options):
    from triton.runtime.interpreter import interpreter_builder as builder

    set_grid_dim, set_grid_idx = builder.set_grid_dim, builder.set_grid_idx
    monkeypatch.setattr(builder, "set_grid_dim", lambda x, y, z: set_grid_dim(programs, y, z))
    monkeypatch.setattr(builder, "set_grid_idx", lambda x, y, z: set_grid_idx(programs - 1, y, z))
    kernel[(1,)](*arguments, **options)


class FifthHead:
    """Five heads of 2²⁵ + 1 tokens, in two segments of which the last has one token. With D = DV = 32 the fifth head
    begins 128 numbers after 2³², so an offset of 32 bits would end at number 128 of the first head. There is
    nothing but zeros but for this last token."""

    T, N, D = 2**25 + 1, 5, 32
    SEGMENT = 2**25

    def __init__(self):
        self.table = gpu.make_table(REBASED, self.D, torch.device("cpu"))
        self.q, self.k, self.v, self.do = (reserve(self.N, self.T, self.D) for _ in range(4))
        for number, x in enumerate((self.q, self.k, self.v, self.do)):
            x[-1, -1] = (torch.arange(self.D) + number) / 64 + 0.1
        self.states = torch.zeros(self.N, 2, self.table.shape[1] * (self.D + 1))
        self.inv_den = reserve(self.N, self.T, dtype=torch.float32)
        self.scale = self.D**-0.5
        self.den = (self.scale * (self.q[-1, -1].float() @ self.k[-1, -1].float())) ** 2
        self.last = [x[-1, -1].float() for x in (self.q, self.k, self.v, self.do)]

    def run(self, monkeypatch, kernel, *tensors):
        arguments = gpu.compiler_arguments(
            kernel, self.D, self.D, self.table.shape[1], torch.float16, self.SEGMENT, False
        )
        numbers = (self.scale, 0.0, 0.0, self.T, 2, 1)  # scale, shift, floor, T, slots, first
        programs = self.N * -(-self.T // arguments["TILE"])
        run_last_program(monkeypatch, kernel, programs, *tensors, self.table, self.states, *numbers, **arguments)


@interprets
def test_output_offsets_have_64_bits(monkeypatch):
    head = FifthHead()
    o = reserve(head.N, head.T, head.D)
    lost = reserve(head.N, head.T, head.D, dtype=torch.bfloat16)
    head.run(monkeypatch, gpu.output_kernel, head.q, head.k, head.v, o, lost, head.inv_den)
    assert torch.allclose(o[-1, -1], head.v[-1, -1])  # no state, one key: o is v
    assert torch.allclose(head.inv_den[-1, -1], 1 / head.den)


@interprets
def test_query_offsets_have_64_bits(monkeypatch):
    """An o of 0 is put in, so that δ is what was lost · do and dq does not vanish."""
    head = FifthHead()
    o = reserve(head.N, head.T, head.D)
    lost = reserve(head.N, head.T, head.D, dtype=torch.bfloat16)
    lost[-1, -1] = 0.5
    head.inv_den[-1, -1] = 1 / head.den
    dq = reserve(head.N, head.T, head.D)
    delta = reserve(head.N, head.T, dtype=torch.float32)
    tensors = (head.q, head.k, head.v, head.do, o, lost, dq, head.inv_den, delta)
    head.run(monkeypatch, gpu.query_kernel, *tensors)
    q, k, v, do = head.last
    assert torch.allclose(delta[-1, -1], do.sum() / 2)
    dw = (do @ v - do.sum() / 2) / head.den
    assert torch.allclose(dq[-1, -1].float(), 2 * head.scale**2 * (q @ k) * dw * k, rtol=1e-3)


@interprets
def test_key_offsets_have_64_bits(monkeypatch):
    head = FifthHead()
    head.inv_den[-1, -1] = 1 / head.den
    delta = reserve(head.N, head.T, dtype=torch.float32)
    delta[-1, -1] = 0.5
    dk = reserve(head.N, head.T, head.D)
    dv = reserve(head.N, head.T, head.D)
    head.run(monkeypatch, gpu.key_kernel, head.q, head.k, head.v, head.do, dk, dv, head.inv_den, delta)
    q, k, v, do = head.last
    assert torch.allclose(dv[-1, -1].float(), do, rtol=1e-3)
    dw = (do @ v - 0.5) / head.den
    assert torch.allclose(dk[-1, -1].float(), 2 * head.scale**2 * (q @ k) * dw * q, rtol=1e-3)


@interprets
@pytest.mark.parametrize("reverse", [False, True])
def test_state_offsets_have_64_bits(monkeypatch, reverse):
    """The last 32 features of the last segment, which comes last forward and first in the mirror."""
    head = FifthHead()
    P_PAD = head.table.shape[1]
    slots = 2 if reverse else 3
    states = reserve(head.N, slots, P_PAD * (head.D + 1), dtype=torch.float32)
    delta = reserve(head.N, head.T, dtype=torch.float32)
    delta[-1, -1] = 0.5
    head.inv_den[-1, -1] = 0.25
    arguments = gpu.compiler_arguments(
        gpu.state_kernel, head.D, head.D, P_PAD, torch.float16, head.SEGMENT, False
    )
    run_last_program(
        monkeypatch, gpu.state_kernel, head.N * (slots - 1) * P_PAD // 32, head.k, head.v, head.inv_den, delta,
        head.table, states, head.T, slots, REVERSE=reverse, **arguments,
    )
    _, k, v, _ = (x.view(1, 1, -1) for x in head.last)
    factor = 0.25 if reverse else 1.0
    column = torch.full((1, 1, 1), -0.5 if reverse else 1.0)
    expected = factor * gpu.state_reference(k, v, column, head.table)[0, -32:]  # (32, DV + 1)
    S = states[-1, -1, : P_PAD * head.D].view(P_PAD, head.D)
    z = states[-1, -1, P_PAD * head.D :]
    assert torch.allclose(S[-32:], expected[:, :-1], rtol=1e-3)
    assert torch.allclose(z[-32:], expected[:, -1], rtol=1e-3)


@interprets
def test_scan_offsets_have_64_bits(monkeypatch):
    """Slots 2³⁰ numbers apart: the fifth begins at 2³². With offsets of 32 bits the third would lie before the first,
    where there are zeros."""
    states = reserve(1, 7, 2**30, dtype=torch.float32)[:, 2:]
    states[0, :, -1] = torch.arange(1.0, 6.0)
    programs = 2**30 // gpu.COLUMNS
    options = {"STATE": 2**30, "ROWS": gpu.ROWS, "COLUMNS": gpu.COLUMNS}
    run_last_program(monkeypatch, gpu.scan_kernel, programs, states, 5, **options)
    assert states[0, :, -1].tolist() == [1.0, 3.0, 6.0, 10.0, 15.0]


# PyTorch's own machinery
@runs
@pytest.mark.parametrize("with_state", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_custom_operations_are_sound(with_state):
    *inputs, _ = inputs_of(4, 40)
    q, k, v = (x.detach().flatten(0, 1).requires_grad_() for x in inputs)
    table = gpu.make_table(REBASED, 4, q.device)
    initial = torch.rand(1, 32 * 6, device=q.device)
    initial *= torch.cat([table[2].repeat_interleave(5), table[2]])  # padding is 0
    first = initial.requires_grad_() if with_state else None
    arguments = (q, k, v, first, table, list(REBASED), 64, with_state)
    torch.library.opcheck(gpu.forward, arguments, rtol=1e-4, atol=1e-4)


@runs
def test_torch_compile_without_a_break_also_after_another_floor():
    kernel = kernels.TaylorKernel(8)
    *inputs, upstream = inputs_of(8, 40)

    def layer(q, k, v):
        return gpu.chunked_attention(q * 2, k, v, kernel.coefficients) + 1

    compiled = torch.compile(layer, fullgraph=True, backend=BACKEND)
    for floor in (0.5, 0.25):
        kernel.floor = floor
        results = [values_and_gradients(f, inputs, upstream) for f in (layer, compiled)]
        assert la.relative_error(*results) < 1e-6


@runs
def test_the_table_that_torch_compile_keeps_is_not_made_inside_the_graph():
    """Else a CUDA graph would record its copy, or own its memory."""
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    *inputs, _ = inputs_of(5, 20)
    torch.compile(lambda *x: gpu.chunked_attention(*x, BASED), fullgraph=True, backend=backend)(*inputs)
    constants = [name for name, _ in graphs[0].named_buffers()]
    assert any("feature_table" in name for name in constants), constants
    assert "torch.tensor" not in graphs[0].code


def test_the_table_is_not_made_while_a_graph_is_recorded(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="once before a CUDA graph"):
        gpu.make_table((0.3, 0.0, 1.0), 3, torch.device("cuda"))


@on_a_card
def test_a_graph_that_was_recorded_gives_the_same_bits():
    *inputs, _ = inputs_of(16, 600, H=2)
    with torch.no_grad():
        expected = gpu.chunked_attention(*inputs, BASED)  # the usual call before, which makes the table
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = gpu.chunked_attention(*inputs, BASED)
    gpu.make_table((0.7, 0.0, 1.0), 16, inputs[0].device)  # another table does not take the place of the first
    found.zero_()
    graph.replay()
    assert torch.equal(found, expected)


@on_a_card
@pytest.mark.parametrize("coefficients", [(0.3, 1.0, 0.5), (0.3, 0.0, 1.0)], ids=str)
def test_reduce_overhead_needs_no_usual_call_before(coefficients):
    """torch.compile records graphs of forward and backward; a table that nobody asked for before is made outside."""
    *inputs, upstream = inputs_of(16, 600, H=2)
    form = partial(gpu.chunked_attention, coefficients=coefficients)
    torch._dynamo.reset()
    compiled = torch.compile(form, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):  # the first calls warm up, one records, later ones replay
        torch.compiler.cudagraph_mark_step_begin()
        found = [x.clone() for x in values_and_gradients(compiled, inputs, upstream)]
    assert la.relative_error(found, values_and_gradients(form, inputs, upstream)) < 1e-6


@runs
def test_inference_first_and_training_after():
    *inputs, upstream = inputs_of(6, 20)
    with torch.inference_mode():
        gpu.chunked_attention(*inputs, BASED)  # makes the table
    values_and_gradients(partial(gpu.chunked_attention, coefficients=BASED), inputs, upstream)


@runs
def test_a_second_derivative_is_refused():
    *inputs, _ = inputs_of(4, 20)
    for loss in (lambda o: o.sum(), lambda o: o.square().sum()):
        gradient, *_ = torch.autograd.grad(loss(gpu.chunked_attention(*inputs, BASED)), inputs, create_graph=True)
        with pytest.raises(RuntimeError, match="use quadratic_attention of 02_linear_attention.py"):
            gradient.sum().backward()


def believe_in_a_gpu(monkeypatch):
    """In the interpreter `attention` of 02 takes the kernels as it does on a GPU; there nothing is changed."""
    if gpu.INTERPRETED:
        source = inspect.getsource(la.attention)
        assert source.count("q.is_cuda") == 1
        scope = dict(vars(la))
        exec(source.replace("q.is_cuda", "True"), scope)
        monkeypatch.setattr(la, "attention", scope["attention"])


@contextlib.contextmanager
def counted_launches(monkeypatch):
    """A list that gets longer whenever the forward operation is called."""
    used = []
    forward = gpu.forward
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "forward", lambda *arguments: used.append(1) or forward(*arguments))
        yield used


@runs
@pytest.mark.parametrize("name,trained_floor,floor", [("based", 0.5, 0.0), ("rebased", 0.0, 0.5)])
def test_the_floor_of_a_trained_model_may_be_set(name, trained_floor, floor, monkeypatch):
    """Trained for a few steps through the kernels, then its floor is moved: before and after, the model with the
    kernels is that with the quadratic form and all others, also when it goes on from a prompt."""
    from rebased import model  # 03_model.py

    torch.manual_seed(0)
    lm = model.LanguageModel(model.recall_config(name, vocab_size=16, d_model=16)).to(benchmark.DEVICE)
    tokens = torch.randint(16, (2, 20), device=benchmark.DEVICE)
    optimizer = torch.optim.Adam(lm.parameters(), lr=0.01)
    believe_in_a_gpu(monkeypatch)
    for _ in range(3):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(lm(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
    kernel = lm.blocks[-1].mixer.kernel
    assert kernel.floor == trained_floor
    seen = []
    for value in (trained_floor, floor):
        kernel.floor = value
        with torch.no_grad(), counted_launches(monkeypatch) as used:
            found = lm(tokens)
            _, states = lm.prefill(tokens[:, :19])
            next_logits, _ = lm.step(tokens[:, 19], states)
        assert len(used) == 2  # of the whole and of the prompt; one more token is a recurrent step
        seen.append(found)
        for form in (la.quadratic_attention, la.linear_attention, la.recurrent_attention, la.attention_on_cpu):
            with torch.no_grad(), monkeypatch.context() as patch:
                patch.setattr(la, "attention", lambda q, k, v, kernel, state, form=form: form(q, k, v, kernel))
                assert la.relative_error([found], [lm(tokens)]) < 1e-5, form.__name__
        assert la.relative_error([next_logits], [found[:, -1]]) < 1e-5
    assert la.relative_error(seen[:1], seen[1:]) > 1e-3  # another floor is another model


@runs
def test_a_model_compiles_without_a_break_through_the_kernels(monkeypatch):
    """On a CPU, `attention` is made to believe in a GPU, and `embed` does not look at the tokens, which is a break."""
    from rebased import model  # 03_model.py

    config = model.recall_config("rebased")
    lm = model.LanguageModel(config).to(benchmark.DEVICE)
    tokens = torch.randint(config.vocab_size, (2, 40), device=benchmark.DEVICE)
    believe_in_a_gpu(monkeypatch)
    if gpu.INTERPRETED:
        monkeypatch.setattr(lm, "embed", lambda tokens: lm.embedding(tokens), raising=True)
    with counted_launches(monkeypatch) as used:
        expected = lm(tokens)
    assert used, "the model does not use the kernels"
    torch._dynamo.reset()
    found = torch.compile(lm, fullgraph=True, backend=BACKEND)(tokens)
    gradients = [torch.autograd.grad(x.square().sum(), list(lm.parameters())) for x in (found, expected)]
    assert la.relative_error([found], [expected]) < 1e-5 and la.relative_error(*gradients) < 1e-4


@compiles
@pytest.mark.slow
def test_a_model_compiles_on_a_cpu():
    """There the chunked form runs; breaks of the graph are allowed."""
    from rebased import model  # 03_model.py

    config = model.recall_config("rebased")
    lm = model.LanguageModel(config)
    tokens = torch.randint(config.vocab_size, (2, 40))
    torch._dynamo.reset()
    expected = lm(tokens)
    found = torch.compile(lm, backend="aot_eager")(tokens)
    gradients = [torch.autograd.grad(x.square().sum(), list(lm.parameters())) for x in (found, expected)]
    assert la.relative_error([found], [expected]) < 1e-5 and la.relative_error(*gradients) < 1e-4


# Limits: one line that says which
def tensors(D=16, DV=5, dtype=torch.float32, device=benchmark.DEVICE, T=4):
    return [torch.empty(1, 1, T, size, dtype=dtype, device=device) for size in (D, D, DV)]


@pytest.mark.parametrize("inputs,coefficients,message", [
    (tensors(), kernels.EluKernel(16).coefficients, "no polynomial"),
    (tensors(), kernels.ElementwiseKernel(16).coefficients, "no polynomial"),
    (tensors(), (1.0, 1.0, 0.0), "c2 is 0.0"),
    (tensors(), (0.0, -1.0, 1.0), "negative"),
    (tensors(dtype=torch.float64), REBASED, "not in torch.float64"),
    (tensors(D=48), REBASED, "at most 32.* 48"),
    (tensors(DV=150), REBASED, "at most 128.* 150"),
    (tensors(DV=128, device="meta", T=2**24), REBASED, "32 bits"),
])
def test_limits_are_named_in_one_line(inputs, coefficients, message):
    line = gpu.why_not(*inputs, coefficients)
    assert "\n" not in line
    with pytest.raises(ValueError, match=f"no Triton kernel for these inputs: .*{message}"):
        gpu.chunked_attention(*inputs, coefficients)


@pytest.mark.parametrize("shapes", [
    ((1, 1, 4, 16), (1, 1, 3, 16), (1, 1, 4, 5)),  # k shorter
    ((1, 1, 4, 16), (1, 1, 4, 16), (1, 1, 3, 5)),  # v shorter
    ((1, 2, 4, 16), (1, 2, 4, 16), (2, 1, 4, 5)),  # as many heads in all, in other places
    ((1, 1, 4, 16), (1, 1, 4, 8), (1, 1, 4, 5)),
    ((1, 1, 0, 16), (1, 1, 0, 16), (1, 1, 0, 5)),
    ((1, 4, 16), (1, 4, 16), (1, 4, 5)),
], ids=str)
def test_shapes_that_do_not_fit_are_refused_in_a_line(shapes):
    """A kernel would read beyond the end of the shorter one."""
    inputs = [torch.empty(shape, device=benchmark.DEVICE) for shape in shapes]
    with pytest.raises(ValueError, match=r"q, k must be \(B, H, T, D\) and v .* they are .*\)$"):
        gpu.chunked_attention(*inputs, REBASED)


@runs
@pytest.mark.parametrize("S,z,message", [
    ((1, 1, 136, 5), None, "give both"),
    ((1, 1, 136, 4), (1, 1, 136), "S must be"),
    ((1, 1, 153, 5), (1, 1, 153), "S must be"),
    ((1, 2, 136, 5), (1, 1, 136), "S must be"),
], ids=str)
def test_states_that_do_not_fit_are_refused_in_a_line(S, z, message):
    S = torch.empty(S, device=benchmark.DEVICE)
    z = None if z is None else torch.empty(z, device=benchmark.DEVICE)
    with pytest.raises(ValueError, match=message):
        gpu.chunked_attention(*tensors(), REBASED, S, z)


@compiles
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_another_device_is_refused_in_one_line(device):
    assert f"one NVIDIA GPU, not on {device}" in gpu.why_not(*tensors(device=device), REBASED)


def test_cards_that_cannot_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "Ampere" in gpu.card_problem(torch.device("cuda")) and "7.5" in gpu.card_problem(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert gpu.card_problem(torch.device("cuda")) is None
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in gpu.card_problem(torch.device("cuda"))


@runs
@pytest.mark.parametrize("segment", [0, -128, 1, 32, 96, 192, 320, 640.0 - 0.5])
def test_segments_that_are_no_whole_tiles_are_refused(segment):
    with pytest.raises(ValueError, match="segment must be 64 or a multiple of 128"):
        gpu.chunked_attention(*tensors(), REBASED, segment=segment)


# Faults that the tests above would notice
@interprets
def test_dropping_delta_is_caught(tmp_path):
    """A copy of the file whose δ is 0 is outside every tolerance."""
    source = Path(gpu.__file__).read_text(encoding="utf-8")
    line = "    delta_tile = tl.sum(do_tile.to(tl.float32) * o_tile, 1, keep_dims=True)"
    assert source.count(line) == 1 and source.count('"rebased::') == 2
    wrong = source.replace(line, line.replace("* o_tile", "* o_tile * 0.0")).replace('"rebased::', '"wrong::')
    file = tmp_path / "wrong.py"
    file.write_text(wrong, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("wrong", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = benchmark.errors(kernels.ReBasedKernel(8), 65, form=module.chunked_attention)
    assert max(found["o"], found["dv"]) <= 1e-5 and min(found["dq"], found["dk"]) > 0.1, found


@runs
def test_weights_that_are_all_0_give_0():
    """ε is what 0 is divided by; gradients are finite, too."""
    q, k, v, upstream = inputs_of(16, 5)
    with torch.no_grad():
        q.zero_()
    o, *gradients = values_and_gradients(lambda q, k, v: gpu.chunked_attention(q, k, v, REBASED), [q, k, v], upstream)
    assert (o == 0).all() and all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("kernel", [gpu.state_kernel, gpu.output_kernel, gpu.query_kernel, gpu.key_kernel])
def test_float32_is_multiplied_exactly(kernel):
    """Triton's own choice for float32 would be tf32. The interpreter does not see the difference."""
    for dtype, expected in ((torch.float32, "ieee"), (torch.float16, "tf32")):
        arguments = gpu.compiler_arguments(kernel, 16, 64, 160, dtype, 512, False)
        assert arguments["PRECISION"] == expected and arguments["DTYPE"] == gpu.tl.float32


@compiles
def test_without_triton_one_line_and_nothing_else_breaks():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from rebased import kernels, linear_attention\n"
        "print(linear_attention.attention(*torch.rand(3, 1, 1, 4, 16), kernels.ReBasedKernel(16)).shape)\n"
        "try:\n"
        "    from rebased import triton_kernels\n"
        "except ImportError as error:\n"
        "    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["torch.Size([1, 1, 4, 16])", gpu.MISSING], done.stderr


@compiles
def test_with_an_old_pytorch_one_line_and_nothing_else_breaks():
    """PyTorch 2.6 cannot read list[float] in the signature of an operation."""
    code = (
        "import torch; torch.__version__ = type(torch.__version__)('2.6.0+cu124')\n"
        "from rebased import linear_attention\n"
        "print(linear_attention.has_triton())\n"
        "try:\n"
        "    from rebased import triton_kernels\n"
        "except ImportError as error:\n"
        "    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    found, message = done.stdout.splitlines()
    assert found == "False" and "needs PyTorch 2.7" in message and "2.6.0+cu124" in message, done.stderr


# Compiled for cards that are not there
@compiles
@pytest.mark.slow
def test_compiled_for_an_a100_and_an_h100_nothing_spills():
    benchmark.check_nothing_spills()
    assert len(benchmark.static_table()) == 12


@compiles
@pytest.mark.slow
def test_two_programs_of_output_and_dq_share_a_multiprocessor_also_under_autocast():
    benchmark.check_two_programs_fit()


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_nor_do_other_types(dtype):
    benchmark.check_nothing_spills(dtype)


@compiles
@pytest.mark.slow
def test_what_autocast_makes_compiles():
    """float32 q and k with bfloat16 v. For an A100 16 bytes of the state kernel spill, so that three programs fit."""
    for (name, capability), made in benchmark.static_table(torch.bfloat16, torch.float32).items():
        spilled = 16 if name.startswith("state") and capability == 80 else 0
        assert made.stack <= spilled, (name, capability, made)
        assert made.shared <= 99 * 1024


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("coefficients,segment", [(BASED, 512), (REBASED, 64)], ids=["based", "segment 64"])
def test_based_and_short_segments_compile_without_a_spill(coefficients, segment):
    for name in benchmark.KERNELS:
        made = benchmark.compile_for(90, name, coefficients=coefficients, segment=segment)
        assert made.stack == 0, (name, made)


def test_no_tile_of_64_rows_has_more_than_four_warps_where_tensor_cores_multiply():
    for dtype, segment in ((torch.bfloat16, 64), (torch.float16, 512), (torch.bfloat16, 512)):
        for kernel in (gpu.output_kernel, gpu.query_kernel, gpu.key_kernel):
            arguments = gpu.compiler_arguments(kernel, 16, 64, 160, dtype, segment, False)
            assert arguments["num_warps"] * 16 == arguments["TILE"]
