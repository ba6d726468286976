"""The specification of experiments/benchmark_gpu.py: the floor, the verdicts, every part tried without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
from experiments import benchmark_gpu as benchmark
from experiments import gpu_variants
from rebased import files, kernels, linear_attention

gpu = benchmark.gpu
ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ["experiments/benchmark_gpu.py"]


def start(*arguments, **environment):
    """The benchmark as a command -> exit status, output."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_the_floor_counts_every_tensor_of_every_kernel():
    """Bytes a token and head at D = 16, DV = 64, bfloat16: a row of q or k is 32, of v 128, of δ or 1/den 4."""
    forward = {"q": 32, "k": 32, "v": 128, "o": 128, "rounding_error": 128, "inv_den": 4}
    queries = {"q": 32, "k": 32, "v": 128, "do": 128, "o": 128, "rounding_error": 128, "dq": 32}
    queries |= {"inv_den": 4, "delta": 4}
    keys = {"q": 32, "k": 32, "v": 128, "do": 128, "dk": 32, "dv": 128, "inv_den": 4, "delta": 4}
    state = 4 * 160 * 65 / 512
    states = 32 + 128 + 4 * state  # k, v; the sums written, read and written by the scan, read by the output
    mirror = 32 + 128 + 8 + 5 * state  # q, do, 1/den, δ; R as S above, and S is read once more
    for kernel, tensors in ((gpu.output_kernel, forward), (gpu.query_kernel, queries), (gpu.key_kernel, keys)):
        names = kernel.arg_names
        assert list(tensors) == sorted(tensors, key=names.index) and len(tensors) == names.index("table")
    (_, moved), (_, moved_back) = benchmark.floor(8192)
    assert moved == sum(forward.values()) + states == 937
    assert moved_back == sum(queries.values()) + sum(keys.values()) + mirror
    (_, moved), (_, moved_back) = benchmark.floor(256)  # one segment, no states
    assert moved == sum(forward.values()) and moved_back == sum(queries.values()) + sum(keys.values())


def test_by_the_floor_512_is_a_good_length_for_a_segment():
    """ns forward and backward. The sums that the design was chosen by were lower by what rounding takes from o, 1/den
    and o read for δ: 132 bytes forward and 256 backward, of 3,000 a ns."""
    for segment, forward, backward in ((512, 0.488, 1.123), (256, 0.545, 1.094), (64, 1.156, 1.784)):
        found, both = benchmark.floor_ns(8192, segment=segment)
        assert abs(found - 132 / 3000 - forward) < 0.001 and abs(both - found - 256 / 3000 - backward) < 0.03
    both = {segment: benchmark.floor_ns(8192, segment=segment)[1] for segment in (64, 256, 512, 1024)}
    assert max(both[256], both[512]) < min(both[64], both[1024])


def test_errors_beyond_the_tolerance_and_nan_are_found():
    right = {"o": 4e-3, "dq": 9e-3, "dk": 9e-3, "dv": 9e-3}
    benchmark.TYPES["bfloat16 on paper"] = (torch.bfloat16, torch.bfloat16)
    try:
        assert benchmark.too_large(right, "bfloat16 on paper") == {}
        assert benchmark.too_large(right | {"o": 6e-3}, "bfloat16 on paper") == {"o": 6e-3}
        assert list(benchmark.too_large(right | {"dk": float("nan")}, "bfloat16 on paper")) == ["dk"]
    finally:
        del benchmark.TYPES["bfloat16 on paper"]


def test_how_many_programs_share_a_multiprocessor():
    assert benchmark.resident_programs(benchmark.Compiled(128, 0, 40_000, 8), 90) == 2  # by registers
    assert benchmark.resident_programs(benchmark.Compiled(32, 0, 99_000, 4), 80) == 1  # by shared memory
    assert benchmark.resident_programs(benchmark.Compiled(32, 0, 0, 4), 90) == 16  # by warps


def test_every_variant_fits_the_kernels_as_they_are():
    sizes = (16, 64, 160, torch.bfloat16, 512, False)
    for name in gpu_variants.VARIANTS:
        changed = gpu_variants.load(name)
        arguments = changed.compiler_arguments(changed.key_kernel, *sizes)
        usual = gpu.compiler_arguments(gpu.key_kernel, *sizes)
        assert (arguments["STEP"], arguments.get("maxnreg")) in ((64, None), (32, 128))
        assert changed.forward._qualname != gpu.forward._qualname and usual["STEP"] == 64


def test_a_variant_that_no_longer_fits_says_so(monkeypatch):
    monkeypatch.setitem(gpu_variants.VARIANTS, "old", [("a line that is gone\n", "")])
    with pytest.raises(ValueError, match="old: rebased/triton_kernels.py has no longer the text 'a line that is gone'"):
        gpu_variants.load("old")


@pytest.mark.skipif(not benchmark.CAN_RUN, reason="test_triton_kernels.py runs it in the interpreter")
@pytest.mark.parametrize("name", [
    "all three", *(pytest.param(name, marks=pytest.mark.slow) for name in gpu_variants.VARIANTS if name != "all three"),
])
def test_variants_compute_the_same(name):
    """Across segments, with a state and its gradient at both ends; with states in bfloat16 to two digits."""
    kernel = kernels.TaylorKernel(4)
    tolerance = 1e-2 if name in ("states in bfloat16", "all three") else 1e-5
    *inputs, upstream = benchmark.make_inputs(4, 150)
    S = torch.rand(1, 1, kernel.num_features, 5, device=benchmark.DEVICE).requires_grad_()
    z = torch.rand(1, 1, kernel.num_features, device=benchmark.DEVICE).requires_grad_()
    found = []
    for module in (gpu, gpu_variants.load(name)):
        results = module.chunked_attention(*inputs, kernel.coefficients, S, z, return_state=True, segment=64)
        upstreams = [upstream, torch.ones_like(S), torch.ones_like(z)]
        found.append([*results, *torch.autograd.grad(results, [*inputs, S, z], upstreams)])
    for expected, result in zip(*found, strict=True):
        assert linear_attention.relative_error([result], [expected]) < tolerance


@pytest.mark.parametrize("arguments, message", [
    (["everything"], "unknown part 'everything'; choose from compiled"),
    (["predicted", "--figure", "x.txt"], "x.txt is no figure's name; let it end in .png"),
])
def test_bad_input_is_refused_in_a_line_before_work(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(arguments)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and message in err.splitlines()[-1] and out == ""


@pytest.mark.slow
@pytest.mark.skipif(benchmark.gpu.INTERPRETED, reason="once is enough")
def test_without_triton_one_line():
    code, text = start("-c", "import sys, runpy; sys.modules['triton'] = None; sys.argv[1:] = []; "
                       "runpy.run_path('experiments/benchmark_gpu.py', run_name='__main__')")
    assert code == 1 and text == benchmark.gpu.MISSING + "\n"


@pytest.mark.skipif(not benchmark.CAN_RUN, reason="test_triton_kernels.py runs it in the interpreter")
def test_the_clock_runs(tmp_path, monkeypatch, capsys):
    """On a few tokens, in the interpreter too: a row of every form, variant and training step, the figure."""
    monkeypatch.setattr(benchmark, "ROWS", tmp_path)  # main sets it: put it back
    figure = tmp_path / "speed.png"
    sizes = ["--lengths", "64", "--tokens", "64", "--variants"]
    benchmark.main(["speed", "step", *sizes, "--rows", str(tmp_path), "--figure", str(figure)])
    assert "checks: 0 passed, 0 failed" in capsys.readouterr().out
    rows = files.read_rows(tmp_path / "gpu_speed.jsonl", ("forward", "forward+backward", "commit"))
    forms = {row["form"] for row in rows}
    assert {"triton_kernels", "the same, q and k float32", "quadratic", "softmax, SDPA"} <= forms
    assert gpu_variants.VARIANTS.keys() <= forms
    assert all(row["forward"][0] > 0 and row["forward+backward"][0] > 0 for row in rows)
    steps = files.read_rows(tmp_path / "gpu_step.jsonl", ("ms", "parameters"))
    assert [row["mixer"] for row in steps] == ["rebased", "based", "attention"]
    assert figure.stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.skipif(benchmark.gpu.INTERPRETED, reason="starts its own process")
def test_all_parts_without_a_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("here they would run on the GPU")
    code, text = start(*SCRIPT, "--figure", str(tmp_path / "speed.png"))
    assert code == 0, text
    for expected in ("ok      nothing spills", "ok      two programs fit", "The floor on an H100",
                     "ok      equals the definition", "0 bad", "No GPU here: no times."):
        assert expected in text, expected
    assert "BAD" not in text


@pytest.mark.slow
@pytest.mark.skipif(benchmark.gpu.INTERPRETED, reason="starts its own process")
def test_the_kernels_spend_at_most_three_times_the_products_of_the_floor():
    """FLOPs of tl.dot as the interpreter meets them, forward and backward, at T = 1,024."""
    code = """
import torch
from triton.runtime.interpreter import interpreter_builder as builder
from experiments import benchmark_gpu as b
flops = []
original = builder.create_dot
def count(x, y, *rest):
    flops.append(2 * x.data.shape[0] * x.data.shape[1] * y.data.shape[1])
    return original(x, y, *rest)
builder.create_dot = count
*inputs, upstream = b.make_inputs(16, 1024, Dv=64)
o = b.gpu.chunked_attention(*inputs, (0, 0, 1))
forward = sum(flops)
torch.autograd.grad(o, inputs, upstream)
print(forward / 1024, (sum(flops) - forward) / 1024)
"""
    status, text = start("-c", code, TRITON_INTERPRET="1")
    assert status == 0, text
    found = [float(number) for number in text.split()]
    for counted, (floor, _) in zip(found, benchmark.floor(1024), strict=True):
        assert floor / 2 < counted < 3 * floor, (counted, floor)


@pytest.mark.slow
@pytest.mark.skipif(benchmark.gpu.INTERPRETED, reason="starts its own processes")
def test_the_first_hour_is_rehearsed_without_a_gpu(tmp_path):
    environment = {"SMALL": "1", "FOLDER": str(tmp_path), "PYTHON": sys.executable}
    command = ["bash", "experiments/gpu_first_hour.sh"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    steps = (tmp_path / "steps.txt").read_text(encoding="utf-8").splitlines()
    names = ["machine", "correct", "speed", "step", "ncu", "tests", "sanitizer", "cell"]
    assert [step.split(":")[0] for step in steps] == names, done.stdout
    assert all("ended with 0" in step for step in steps), done.stdout
    assert all((tmp_path / f"{name}.txt").stat().st_size > 10 for name in names)
    for part in ("correct", "speed", "variants", "step"):
        assert files.read_rows(tmp_path / f"gpu_{part}.jsonl"), part
    assert len(files.read_rows(tmp_path / "mqar_cell.jsonl")) >= 3
