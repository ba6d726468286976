"""The specification of 02_linear_attention_triton.py: interpreted, on a GPU if there is one, compiled.

A process in which TRITON_INTERPRET is set cannot compile, and Triton reads it when it is imported. So the tests
that run kernels skip themselves in an ordinary process without a GPU, and one test runs them
all in a process of their own.
"""

import inspect
import os
import subprocess
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: the GPU kernels cannot be tested")
kernels = import_module("01_kernels")
la = import_module("02_linear_attention")
gpu = import_module("02_linear_attention_triton")
benchmark = import_module("02_linear_attention_triton_benchmark")
model = import_module("03_model")
ROOT = Path(__file__).parent.parent
RUNS = gpu.INTERPRETED or torch.cuda.is_available()
runs = pytest.mark.skipif(not RUNS, reason="no GPU; test_in_the_interpreter runs it")
compiles = pytest.mark.skipif(gpu.INTERPRETED, reason="the interpreter's process cannot compile")
KERNELS = {"rebased": kernels.ReBasedKernel(16), "based": kernels.TaylorKernel(16)}
DTYPES = list(benchmark.TOLERANCE)
LENGTHS = [1, 31, 64, 65, pytest.param(600, marks=pytest.mark.slow)]


def interpret(*arguments):
    """Run this file's tests, or another command, in a process in which Triton interprets."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@compiles
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_in_the_interpreter(which):
    code, text = interpret("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", which, __file__)
    assert code == 0 and "passed" in text, text


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("T", LENGTHS)
def test_equals_the_definition(T, name, dtype):
    found = benchmark.errors(KERNELS[name], T, dtype, H=2 if T == 65 else 1)
    assert max(found) <= benchmark.TOLERANCE[dtype], found


@runs
@pytest.mark.parametrize("D,Dv", [(1, 1), (8, 10), (7, 42), (32, 128)])
def test_any_size(D, Dv):
    assert max(benchmark.errors(kernels.TaylorKernel(D), 40, torch.float32, segment=32, Dv=Dv)) <= 1e-5


def test_the_table_gives_the_features_number_by_number():
    x = torch.randn(3, 7, dtype=torch.float64)
    for kernel in (kernels.ReBasedKernel(7), kernels.TaylorKernel(7), kernels.ReBasedKernel(7, floor=0.5)):
        a, b, c = gpu.feature_table(kernel.coefficients, 7, "cpu")[:, : kernel.num_features].double()
        x1 = torch.nn.functional.pad(x, (0, 1), value=1.0)  # column −1 reads 1
        assert torch.allclose(c * x1[:, a.long()] * x1[:, b.long()], kernel.features(x))


@runs
def test_the_check_of_the_file():
    """The same as above at T = 150, every kernel and type."""
    benchmark.check_equals_the_definition()


@runs
def test_three_pieces_equal_one_run_and_so_do_their_gradients():
    kernel, state, pieces = KERNELS["rebased"], None, []
    *inputs, upstream = benchmark.inputs_away_from_zero(kernel, 150)
    for a, b in ((0, 70), (70, 71), (71, 150)):
        o, state = gpu.triton_attention(*(x[:, :, a:b] for x in inputs), kernel, state, True, segment=64)
        pieces.append(o)
    carried, whole = torch.cat(pieces, 2), gpu.triton_attention(*inputs, kernel, segment=64)
    assert la.distance(*([o, *torch.autograd.grad(o, inputs, upstream)] for o in (carried, whole))) < 1e-5


@runs
def test_any_strides():
    kernel, (q, k, v, upstream) = KERNELS["rebased"], benchmark.inputs_away_from_zero(KERNELS["rebased"], 70, H=2)
    expected = gpu.triton_attention(q, k, v, kernel)
    wanted = torch.autograd.grad(expected, (q, k, v), upstream)
    layouts = [
        lambda x: x.detach().transpose(1, 2).contiguous().transpose(1, 2),  # as a split projection lies
        lambda x: x.detach().mT.contiguous().mT,  # rows that are not contiguous
        lambda x: x.detach().repeat_interleave(2, 2)[:, :, ::2],  # every other row of a larger tensor
    ]
    for layout in layouts:
        inputs = [layout(x).requires_grad_() for x in (q, k, v)]
        o = gpu.triton_attention(*inputs, kernel)
        gradients = torch.autograd.grad(o, inputs, layout(upstream))
        assert all(torch.equal(a, b) for a, b in zip([o, *gradients], [expected, *wanted], strict=True))
    ones = torch.ones((), device=q.device).expand_as(upstream)  # all strides 0, as from o.sum().backward()
    found, wanted = (
        torch.autograd.grad(gpu.triton_attention(q, k, v, kernel), (q, k, v), x) for x in (ones, ones.contiguous())
    )
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@runs
def test_two_runs_give_the_same_bits():
    kernel, (*inputs, upstream) = KERNELS["based"], benchmark.inputs_away_from_zero(KERNELS["based"], 130)
    first, second = (
        [o := gpu.triton_attention(*inputs, kernel, segment=64), *torch.autograd.grad(o, inputs, upstream)] for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@runs
@pytest.mark.parametrize("T", [40, 150])
def test_gradients_through_both_states(T):
    """Against the chunked form in float64: initial state in, final state out, an upstream gradient on each."""
    kernel = KERNELS["based"]
    *inputs, upstream = benchmark.inputs_away_from_zero(kernel, T)
    state = [torch.rand(1, 1, *s, device=upstream.device).requires_grad_() for s in ((kernel.num_features, 5), (153,))]

    def gradients(form, inputs, state, upstream):
        o, final = form(*inputs, kernel, la.State(*state), True)
        return [o, *final], torch.autograd.grad(
            [o, *final], [*inputs, *state], [upstream, *map(torch.ones_like, final)],
        )

    def exact(tensors):
        return [x.detach().double().requires_grad_() for x in tensors]

    found = gradients(partial(gpu.triton_attention, segment=64), inputs, state, upstream)
    wanted = gradients(la.chunked_attention, exact(inputs), exact(state), upstream.double())
    for a, b in zip(found[0] + list(found[1]), wanted[0] + list(wanted[1]), strict=True):
        assert la.distance([a.double()], [b]) < 1e-5


@runs
def test_only_the_state_is_used():
    kernel, (*inputs, _) = KERNELS["rebased"], benchmark.inputs_away_from_zero(KERNELS["rebased"], 70)
    _, state = gpu.triton_attention(*inputs, kernel, return_state=True)
    found = torch.autograd.grad(state.S.sum() + state.z.sum(), inputs[1:])
    _, state = la.chunked_attention(*inputs, kernel, return_state=True)
    assert la.distance(found, torch.autograd.grad(state.S.sum() + state.z.sum(), inputs[1:])) < 1e-5


@runs
def test_custom_operations_are_sound():
    q, k, v, _ = (x.flatten(0, 1) for x in benchmark.inputs_away_from_zero(KERNELS["rebased"], 40))
    initial = torch.rand(1, -(-136 * 6 // 16) * 16, device=q.device)
    q, k, v, initial = (x.detach().requires_grad_() for x in (q, k, v, initial))
    for first, keep in ((None, False), (initial, True)):
        torch.library.opcheck(gpu.forward, (q, k, v, first, [0.0, 0.0, 1.0], 32, keep), rtol=1e-4, atol=1e-4)


BACKEND = "inductor" if torch.cuda.is_available() else "aot_eager"


@runs
def test_torch_compile_without_a_break():
    kernel, (*inputs, upstream) = KERNELS["rebased"], benchmark.inputs_away_from_zero(KERNELS["rebased"], 70)

    def layer(q, k, v):
        return gpu.triton_attention(q * 2, k, v, kernel) + 1

    compiled = torch.compile(layer, fullgraph=True, backend=BACKEND)
    results = [[o := f(*inputs), *torch.autograd.grad(o, inputs, upstream)] for f in (layer, compiled)]
    assert la.distance(*results) < 1e-6


@runs
def test_a_model_compiles_without_a_break_through_the_kernels(monkeypatch):
    """On a CPU, `attention` is made to believe in a GPU, and `embed` does not look at the tokens, which is a break."""
    config = model.recall_config("rebased")
    lm = model.LanguageModel(config).to(benchmark.DEVICE)
    tokens = torch.randint(config.vocab_size, (2, 40), device=benchmark.DEVICE)
    used = []
    if gpu.INTERPRETED:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
        source = inspect.getsource(la.attention)
        assert source.count("q.is_cuda") == 1
        scope = vars(la) | {"sys": la.sys}
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
    grads = [torch.autograd.grad(x.square().sum(), list(lm.parameters())) for x in (found, expected)]
    assert la.distance([found], [expected]) < 1e-5 and la.distance(*grads) < 1e-4


@compiles
@pytest.mark.slow
def test_a_model_compiles_on_a_cpu():
    """There the chunked form runs; breaks of the graph are allowed."""
    config = model.recall_config("rebased")
    lm, tokens = model.LanguageModel(config), torch.randint(config.vocab_size, (2, 40))
    torch._dynamo.reset()
    expected, found = lm(tokens), torch.compile(lm, backend="aot_eager")(tokens)
    grads = [torch.autograd.grad(x.square().sum(), list(lm.parameters())) for x in (found, expected)]
    assert la.distance([found], [expected]) < 1e-5 and la.distance(*grads) < 1e-4


@runs
@pytest.mark.parametrize("change,message", [
    (lambda q, k, v, kernel: (q, k, v, kernels.EluKernel(16)), "coefficients"),
    (lambda q, k, v, kernel: (q, k, v, kernels.ReBasedKernel(16, variant="elementwise")), "coefficients"),
    (lambda q, k, v, kernel: (q.double(), k.double(), v.double(), kernel), "float64"),
    (lambda q, k, v, kernel: (q.repeat(1, 1, 1, 3),) * 2 + (v, kernels.ReBasedKernel(48)), "D at most 32"),
    (lambda q, k, v, kernel: (q, k, v.repeat(1, 1, 1, 30), kernel), "Dv at most 128"),
    (lambda q, k, v, kernel: (q[:, :, 1:], k, v, kernel), "disagree"),
])
def test_limits_are_named_in_one_line(change, message):
    q, k, v, _ = benchmark.inputs_away_from_zero(KERNELS["rebased"], 20)
    with pytest.raises(ValueError, match=message) as error:
        gpu.triton_attention(*change(q, k, v, KERNELS["rebased"]))
    assert "\n" not in str(error.value)


@compiles
def test_the_cpu_is_refused_in_one_line():
    q, k, v = torch.rand(3, 1, 1, 4, 16)
    with pytest.raises(ValueError, match="tensors on one NVIDIA GPU, got cpu"):
        gpu.triton_attention(q, k, v, KERNELS["rebased"])


@compiles
def test_dropping_delta_is_caught(tmp_path):
    """A copy of the file whose δ is 0 is outside every tolerance."""
    source, line = Path(gpu.__file__).read_text(), "    d = tl.sum(dot.to(tl.float32) * o_exact, 1)[:, None]\n"
    assert source.count(line) == 1
    (tmp_path / "wrong.py").write_text(source.replace(line, line.replace("o_exact", "0.0 * o_exact")))
    code = (f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]\n"
            "import torch, wrong; sys.modules['02_linear_attention_triton'] = wrong\n"
            "from importlib import import_module; benchmark = import_module('02_linear_attention_triton_benchmark')\n"
            "print(*benchmark.errors(benchmark.kernels.ReBasedKernel(16), 65, torch.float32))")
    status, out = interpret("-c", code)
    assert status == 0, out
    o, dq, dk, dv = map(float, out.split())
    assert max(o, dv) <= 1e-5 and min(dq, dk) > 0.1, out


@compiles
def test_without_triton_one_line_and_nothing_else_breaks():
    hide = "import sys; sys.modules['triton'] = None; from importlib import import_module\n"
    code = hide + "import torch; la = import_module('02_linear_attention'); k = import_module('01_kernels')\n" + (
        "print(la.attention(*torch.rand(3, 1, 1, 4, 16), k.ReBasedKernel(16)).shape)\n"
        "try: import_module('02_linear_attention_triton')\nexcept ImportError as error: print(error)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["torch.Size([1, 1, 4, 16])", gpu.MISSING], done.stderr


@compiles
def test_compiled_for_an_a100_and_an_h100_nothing_spills():
    benchmark.check_nothing_spills()
    assert len(benchmark.static_table()) == 12


@compiles
def test_by_its_counts_a_long_sequence_takes_less_than_three_floors():
    """Even if products, memory, L2 and issue did not overlap: a bound on the code, no measurement."""
    for found, floor in zip(benchmark.predicted_ns(8192), benchmark.floor_ns(8192), strict=True):
        assert 0 < found[0] < found[1] < 3 * floor


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_nor_do_other_types(dtype):
    benchmark.check_nothing_spills(dtype)


@pytest.mark.slow
@pytest.mark.skipif(not gpu.INTERPRETED, reason="the interpreter counts")
def test_the_counts_are_those_of_a_run(monkeypatch):
    """FLOPs exactly, bytes asked of L2 within 2 % (the table of φ is not counted), forward and backward."""
    from triton.runtime.interpreter import interpreter_builder as builder

    flops, moved = [], []

    def count(name, log, measure):
        original = getattr(builder, name)
        monkeypatch.setattr(builder, name, lambda *a: log.append(measure(*a)) or original(*a))

    count("create_dot", flops, lambda a, b, *_: 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1])
    count("create_masked_load", moved, lambda p, mask, *_: mask.data.sum() * p.dtype.element_ty.primitive_bitwidth // 8)
    count("create_masked_store", moved, lambda p, x, mask, *_: mask.data.sum() * p.dtype.element_ty.primitive_bitwidth // 8)
    kernel, T = KERNELS["rebased"], 1024
    *inputs, upstream = benchmark.inputs_away_from_zero(kernel, T, Dv=64)
    counted = list(benchmark.counted(T, gpu.sizes_for(16, 64, 136, torch.float32), size=4).values())

    def compare(rows):
        expected, _, from_cache = (T * sum(column) for column in zip(*rows, strict=True))
        assert sum(flops) == expected
        assert abs(sum(moved) / from_cache - 1) < 0.02, (sum(moved), from_cache)
        flops.clear(), moved.clear()

    o = gpu.triton_attention(*inputs, kernel)
    compare(counted[:3])
    torch.autograd.grad(o, inputs, upstream)
    compare(counted[3:])


def test_the_floor_is_the_sum_that_the_design_was_chosen_by():
    """Segments of 512: .488 ns forward, .219 of it compute, and 1.12 backward; of 64: 1.156 and 1.784."""
    for segment, forward, backward in ((512, 0.488, 1.123), (256, 0.545, 1.094), (64, 1.156, 1.784)):
        found, both = benchmark.floor_ns(8192, segment=segment)
        assert abs(found - forward) < 0.001 and abs(both - found - backward) < 0.03
    assert all(benchmark.floor_ns(T)[0] > 320 / 3.0e12 * 1e9 for T in (256, 8192))  # inputs and outputs alone
