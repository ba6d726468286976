"""The specification of experiments/benchmark_cpu.py: what is timed is right, what does not fit is left out, rows say
where they come from, and the sentences under the tables follow from their numbers."""

import json
import re

import pytest
import torch

from experiments import benchmark_cpu as benchmark
from rebased import files, kernels, linear_attention

SPEED = (1e11, 1e10, 5e-6)  # FLOP/s, bytes/s, seconds of a call


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# What is timed
@pytest.mark.parametrize("form", benchmark.COMPARED)
def test_a_call_runs_the_form_once(form):
    assert benchmark.make_call(form, 20, backward=False)().shape == (1, 4, 20, 64)
    gradients = benchmark.make_call(form, 20, backward=True)()
    size = 64 if form == "softmax" else 16
    assert [x.shape[-1] for x in gradients] == [size, size, 64] and all(x.any() for x in gradients)


def test_idiaps_form_is_rebased(monkeypatch):
    """Through a stand-in for the compiled product."""

    def causal_dot_product(q, k, v):
        return (q @ k.mT).tril() @ v

    monkeypatch.setattr(benchmark, "causal_dot_product", causal_dot_product)
    inputs = [x.double() for x in benchmark.make_inputs("idiap", 20, backward=False)]
    kernel = kernels.ReBasedKernel(16)
    expected = linear_attention.quadratic_attention(*inputs, kernel)
    torch.testing.assert_close(benchmark.idiap_attention(*inputs, kernel), expected, rtol=1e-9, atol=0)
    assert {name for name, _ in benchmark.contenders(20, False)} == {"product", "softmax", "chunked", "idiap"}


def test_turns_on_one_core_and_two(monkeypatch):
    monkeypatch.setattr(benchmark, "causal_dot_product", None)
    calls = benchmark.contenders(20, backward=True)
    assert list(calls) == [(name, n) for name in ("product", "softmax", "chunked") for n in (1, 2)]
    for threads in (2, 1):
        calls["chunked", threads]()
        assert torch.get_num_threads() == threads


# What is left out
def test_what_does_not_fit():
    """T² weights, T states, and states that autograd keeps, beyond 2 GB; softmax beyond 20 seconds."""

    def fitting(T, backward):
        return {form for form in benchmark.COMPARED if benchmark.fits(form, T, backward, SPEED)}

    everything = set(benchmark.COMPARED)
    assert fitting(1024, False) == fitting(1024, True) == everything
    assert fitting(8192, False) == everything - {"quadratic", "linear"}
    assert fitting(8192, True) == {"softmax", "chunked"}
    assert "softmax" not in fitting(131_072, False) and "chunked" in fitting(131_072, True)


def test_four_times_the_tokens():
    """Predicted seconds: 16 times for softmax and the quadratic form, 4 for the others, but for what does not grow."""
    for form, ratio in (("softmax", 16), ("quadratic", 16), ("linear", 4), ("recurrent", 4), ("chunked", 4)):
        few, many = (benchmark.predicted_seconds(form, T, True, SPEED) for T in (16_384, 65_536))
        assert many / few == pytest.approx(ratio, rel=0.02), form


# What is kept, what is held
def test_kept_bytes_counts_each_storage_once():
    x = torch.rand(1000, requires_grad=True)
    assert benchmark.kept_bytes(lambda: x * x) == x.nbytes
    assert benchmark.kept_bytes(lambda: x.view(10, 100).sin() * x[:100]) == 2 * x.nbytes
    assert benchmark.kept_bytes(lambda: x.detach() * 2) == 0


def test_the_fast_form_keeps_less():
    inputs = benchmark.make_inputs("chunked", 1024, backward=True)
    forms = benchmark.by_chunk(*inputs, kernels.ReBasedKernel(16))
    kept = {name: benchmark.kept_bytes(lambda form=form: form(*inputs)) for name, form in forms.items()}
    assert kept["02, to be read", 64] > 2 * kept["chunked_cpu", 64] > 2 * kept["chunked_cpu", 256]


def test_every_chunk_is_the_same_function():
    inputs = [x.double() for x in benchmark.make_inputs("chunked", 100, backward=False)]
    kernel = kernels.ReBasedKernel(16)
    expected = linear_attention.quadratic_attention(*inputs, kernel)
    for form in benchmark.by_chunk(*inputs, kernel).values():
        torch.testing.assert_close(form(*inputs), expected, rtol=1e-9, atol=1e-12)


def test_peak_memory():
    """Twice the tokens, more memory; less than a gigabyte, more than the output."""
    if benchmark.peak_bytes.__globals__["Path"]("/proc/self/clear_refs").exists():
        peak = benchmark.measure_peak("linear", 512, torch.get_num_threads())
        assert 512 * 4 * 136 * 64 * 4 < peak < 1e9


@pytest.mark.slow
def test_peak_memory_in_a_child():
    few, many = (benchmark.peak_bytes("chunked", T) for T in (4096, 16_384))
    assert few is None or few < many


# The sentences
def rows_of(*pairs):
    return [{"T": T, "seconds": {"chunked": chunked} | ({"softmax": softmax} if softmax else {})}
            for T, chunked, softmax in pairs]


@pytest.mark.parametrize(
    "pairs, sentence",
    [
        ([(256, 2, 1), (512, 2, 3), (1024, 2, None)], "from T = 512 on"),
        ([(256, 2, 3), (512, 3, 2), (1024, 2, 3)], "from T = 1,024 on"),
        ([(256, 2, 3)], "from T = 256 on"),
        ([(256, 2, 1)], "at no length here"),
    ],
)
def test_ahead_of_softmax(pairs, sentence):
    assert sentence in benchmark.ahead_of_softmax(rows_of(*pairs))


def test_ratios_of_one_run():
    seconds = {("chunked", 1): 2.0, ("chunked", 2): 1.0, ("softmax", 1): 8.0, ("softmax", 2): 5.0}
    row = benchmark.ratios(512, True, seconds)
    assert row["T"] == 512 and row["backward"] is True
    assert row["over_chunked"] == {"chunked, 1": 1.0, "chunked, 2": 1.0, "softmax, 1": 4.0, "softmax, 2": 5.0}
    assert row["one_core_over_two"] == {"chunked": 2.0, "softmax": 1.6}


def test_the_reading_of_the_chunks(capsys):
    benchmark.read_chunks({16: (9.0, 3.0), 64: (5.0, 2.2), 128: (6.0, 2.0)})
    out = capsys.readouterr().out
    assert "least predicted cost is 64, the fastest measured 128: the choice costs a factor of 1.10." in out


# The commands
def test_forms(tmp_path, monkeypatch, capsys):
    """Two tables, a row for each line as it comes, with its provenance; the figure."""
    monkeypatch.setattr(benchmark, "peak_bytes", lambda form, T: 1_000_000)
    monkeypatch.setattr(benchmark.lesson, "machine_speed", lambda: SPEED)
    rows = tmp_path / "rows.jsonl"
    figure = tmp_path / "figure.png"
    benchmark.main(["forms", "--lengths", "8", "16", "--threads", "1", "--rows", str(rows), "--figure", str(figure)])
    written = files.read_rows(rows, ("T", "backward", "threads", "seconds", "command", "commit", "date", "hardware"))
    assert [(row["T"], row["backward"]) for row in written] == [(8, False), (16, False), (8, True), (16, True)]
    assert all(row["seconds"].keys() == set(benchmark.COMPARED) and row["threads"] == 1 for row in written)
    assert all((row["share"] is None) == (row["peak_bytes"] is not None) == row["backward"] for row in written)
    out = capsys.readouterr().out
    assert out.count("The chunked form is ahead of softmax") == 2 and len(re.findall(r"^ +(8|16) ", out, re.M)) == 4
    assert figure.exists() or "no figure" in out


def test_ratios(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark.lesson, "median_seconds", lambda calls, repeats: dict.fromkeys(calls, 0.5))
    rows = tmp_path / "rows.jsonl"
    monkeypatch.setenv("OMP_PROC_BIND", "true")
    benchmark.main(["ratios", "--lengths", "8", "--rows", str(rows)])
    written = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    assert [row["backward"] for row in written] == [False, True]
    assert written[0]["OMP_PROC_BIND"] == "true" and written[0]["over_chunked"]["softmax, 2"] == 1.0
    assert "T = 8, forward + backward" in capsys.readouterr().out


def test_chunks(monkeypatch, capsys):
    monkeypatch.setattr(benchmark.lesson, "median_seconds", lambda calls, repeats: dict.fromkeys(calls, 0.5))
    benchmark.main(["chunks", "--lengths", "512"])
    out = capsys.readouterr().out
    assert out.count("chunked_cpu  ") == 6 and "The chunk of least predicted cost is" in out and "φ of 4 × 512" in out


@pytest.mark.parametrize(
    "command",
    ["", "all", "forms --lengths 0", "forms --rows /proc/no/such.jsonl", "ratios --threads 2", "chunks x"],
)
def test_what_the_user_can_mend(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(command.split())
    assert stopped.value.code == 2 and "error:" in capsys.readouterr().err
