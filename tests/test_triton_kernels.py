"""The specification of rebased/triton_kernels.py: interpreted, on a GPU if there is one, compiled.

A process in which TRITON_INTERPRET is set cannot compile, and Triton reads it when it is imported. So the tests that
run kernels skip themselves in an ordinary process without a GPU, and one test runs them all, and those of the
benchmark, in a process of their own.
"""

import importlib.util
import inspect
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


@pytest.mark.skipif(benchmark.DEVICE != "cuda", reason="needs a GPU: the interpreter runs one thing at a time")
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


@interprets
def test_the_last_head_of_tensors_beyond_two_to_the_31_numbers(monkeypatch):
    """Only the last programs run, on memory that is never touched elsewhere: offsets to a head have 64 bits."""
    from triton.runtime.interpreter import interpreter_builder as builder

    N, T, D, DV = 2**26 + 1, 1, 16, 64  # N·T·DV > 2³¹
    untouched = [torch.empty(N, T, size, dtype=torch.float16) for size in (D, D, DV, DV)]
    low = torch.empty(N, T, DV, dtype=torch.bfloat16)
    q, k, v, o = untouched
    for x in (q, k, v):
        x[-1] = torch.arange(x[-1].numel()).to(x.dtype).view(x[-1].shape) / 64 + 0.1
    inv_den = torch.empty(N, T)
    table = gpu.make_table(REBASED, D, q.device)
    set_grid_idx = builder.set_grid_idx
    monkeypatch.setattr(builder, "set_grid_idx", lambda x, y, z: set_grid_idx(N - 1, y, z))
    monkeypatch.setattr(gpu.triton, "cdiv", lambda a, b: 1 / N)  # one program
    monkeypatch.setattr(builder, "set_grid_dim", lambda *grid: None)
    builder.grid_dim = (N, 1, 1)
    states = torch.empty(N, 0, 1)
    arguments = gpu.compiler_arguments(gpu.output_kernel, D, DV, table.shape[1], v.dtype, 512, False)
    gpu.output_kernel[(1,)](q, k, v, o, low, inv_den, table, states, 1.0, 0.0, 0.0, T, 0, 1, **arguments)
    assert torch.allclose(o[-1], v[-1])  # after one token o is v


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


@runs
def test_a_model_compiles_without_a_break_through_the_kernels(monkeypatch):
    """On a CPU, `attention` is made to believe in a GPU, and `embed` does not look at the tokens, which is a break."""
    from rebased import model  # 03_model.py

    config = model.recall_config("rebased")
    lm = model.LanguageModel(config).to(benchmark.DEVICE)
    tokens = torch.randint(config.vocab_size, (2, 40), device=benchmark.DEVICE)
    used = []
    if gpu.INTERPRETED:
        source = inspect.getsource(la.attention)
        assert source.count("q.is_cuda") == 1
        scope = dict(vars(la))
        exec(source.replace("q.is_cuda", "True"), scope)
        monkeypatch.setattr(la, "attention", scope["attention"])
        monkeypatch.setattr(lm, "embed", lambda tokens: lm.embedding(tokens), raising=True)
    forward = gpu.forward
    monkeypatch.setattr(gpu, "forward", lambda *a: used.append(1) or forward(*a))
    expected = lm(tokens)
    assert used, "the model does not use the kernels"
    monkeypatch.setattr(gpu, "forward", forward)
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


# The launches themselves: the real path of forward and backward, up to a driver that only takes notes
class RecordingDriver:
    """Stands in for the driver of one card: compiles for it, and notes launches instead of making them."""

    def __init__(self, capability):
        self.target = gpu.triton.backends.compiler.GPUTarget("cuda", capability, 32)
        self.utils = self
        self.launches = []

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return self.target

    def get_device_properties(self, device):
        return {"max_shared_mem": 99 * 1024}  # of a consumer card

    def load_binary(self, name, binary, shared, device):
        registers, stack = benchmark.registers_and_stack(binary)
        return "module", (registers, stack), registers, 0, 1024

    def launcher_cls(self, source, metadata):
        def launch(x, y, z, stream, function, packed, launch_metadata, enter, leave, *values):
            arguments = dict(zip(source.fn.arg_names, values, strict=True))
            self.launches.append((source.fn.__name__, (x, y, z), arguments, metadata, *function))

        return launch


@pytest.fixture
def record(monkeypatch):
    """record(capability, T, D, Dv, dtypes, with_states): the launches of forward and backward on CPU tensors."""
    from triton.runtime import driver

    kernel_functions = {id(kernel): kernel for kernel, _ in benchmark.KERNELS.values()}.values()

    def forget():
        driver._active = None
        for kernel in kernel_functions:
            kernel.device_caches.clear()  # what was compiled for another card

    def start(capability, T=70, D=16, Dv=64, dtypes=(torch.bfloat16, torch.bfloat16), states=False, c=REBASED):
        forget()
        recorder = RecordingDriver(capability)
        driver.set_active(recorder)
        monkeypatch.setattr(gpu, "card_problem", lambda device: None)
        monkeypatch.setattr(gpu, "INTERPRETED", True)  # or a CPU would be refused
        q, k, v, upstream = benchmark.make_inputs(D, T, Dv=Dv, H=3, dtypes=dtypes)
        P = gpu.count_features(c, D)
        S = z = None
        if states:
            S, z = torch.rand(1, 3, P, Dv, requires_grad=True), torch.rand(1, 3, P, requires_grad=True)
        result = gpu.chunked_attention(q, k, v, c, S, z, return_state=states)
        if states:
            (result[0].float().sum() + result[1].sum() + result[2].sum()).backward()
        else:
            torch.autograd.grad(result, (q, k, v), upstream)
        return recorder.launches

    yield start
    forget()


@compiles
@pytest.mark.parametrize("T,states,slots", [
    (2048, True, 5),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in [
        (1, False, 0), (512, False, 0), (513, False, 2), (2048, False, 4), (1, True, 2),
    ]),
])
def test_the_launches_have_the_grids_that_the_sizes_ask_for_and_nothing_spills(record, T, states, slots):
    tiles = 3 * -(-T // 128)  # three heads
    blocks = 5  # 160 features, 32 at a time
    sums = [("state_kernel", 3 * (slots - 1) * blocks), ("scan_kernel", 3 * -(-160 * 65 // 256))] if slots > 1 else []
    expected = [*sums, ("output_kernel", tiles), ("query_kernel", tiles), *sums, ("key_kernel", tiles)]
    launches = record(90, T=T, states=states)
    assert [(name, grid[0]) for name, grid, *_ in launches] == expected
    for name, grid, arguments, metadata, registers, stack in launches:
        assert grid[1:] == (1, 1)  # the first axis is the only one that may exceed 65,535
        assert metadata.num_warps == (4 if name in ("state_kernel", "scan_kernel") else 8)
        assert arguments["slots"] == slots
        assert stack == 0, (name, stack)
        assert name not in ("output_kernel", "query_kernel") or registers <= 128, (name, registers)
        for pointer in ("q", "k", "v", "x", "y", "states", "table"):
            assert pointer not in arguments or arguments[pointer].is_contiguous()


SIZES = [  # capability, T, D, Dv, types, states, coefficients
    (capability, 2048, 16, 64, "bfloat16", False, REBASED) for capability in (80, 86, 89, 90, 100, 120)
] + [
    (90, 513, D, Dv, type_name, True, BASED)
    for type_name in ("bfloat16", "float16", "float32") for D, Dv in ((8, 5), (16, 128), (32, 21))
]


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("capability,T,D,Dv,type_name,states,coefficients", SIZES)
def test_every_card_and_size_binds_compiles_and_fits(record, capability, T, D, Dv, type_name, states, coefficients):
    """Shared memory beyond 99 KiB or an argument that does not bind would raise. At D = 16, Dv = 64 nothing spills."""
    dtype = getattr(torch, type_name)
    launches = record(capability, T, D, Dv, (dtype, dtype), states, coefficients)
    assert [name for name, *_ in launches] == [
        "state_kernel", "scan_kernel", "output_kernel", "query_kernel", "state_kernel", "scan_kernel", "key_kernel"
    ]
    for name, *_, stack in launches:
        assert stack == 0 or (D, Dv) != (16, 64), (name, stack)


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("variant", benchmark.VARIANTS)
def test_other_launches_compile(record, variant):
    with benchmark.launched_with(benchmark.VARIANTS[variant]):
        launches = record(90, 2048)
    changed = [metadata for name, _, _, metadata, *_ in launches if name in benchmark.VARIANTS[variant]]
    for metadata in changed:
        for option in ("maxnreg", "num_stages"):
            wanted = [changes[option] for changes in benchmark.VARIANTS[variant].values() if option in changes]
            assert not wanted or getattr(metadata, option) == wanted[0]
    assert changed
