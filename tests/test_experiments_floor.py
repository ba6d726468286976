"""The specification of experiments/floor.py and its report: contexts with counts, what is run, statistics, tables."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from experiments import floor, floor_report
from rebased import lesson, train_mqar

SMALL = floor.Run("based", 0.5, seed=3, learning_rate=0.01, steps=4, d_model=16)


# Contexts
@pytest.mark.parametrize("placement", ["official", "uniform"])
@pytest.mark.parametrize("length", [64, 70, 128, 600])
def test_a_short_context_is_the_long_one(length, placement):
    """The examples of 04, read by hand: same pairs, same queries in the same order, same filler before each."""
    power_a = train_mqar.PLACEMENTS[placement]
    short = floor.short_contexts(20, length, power_a, seed=5)
    inputs, labels = train_mqar.make_mqar(20, length, 16, 256, power_a, seed=5)
    assert torch.equal(short.tokens[:, :32], inputs[:, :32])
    fillers = floor.fillers_before(short)
    for i in range(20):
        queries = [t for t in range(length) if labels[i, t] != -100]
        assert short.targets[i].tolist() == [labels[i, t].item() for t in queries]
        assert short.tokens[i, short.positions[i]].tolist() == [inputs[i, t].item() for t in queries]
        assert fillers[i].tolist() == [(inputs[i, :t] == 0).sum().item() for t in queries]


@pytest.mark.parametrize("kernel", ["softmax", "rebased", "based", "elementwise", "quartic", "cosine"])
def test_a_short_context_has_the_same_logits(kernel):
    """In float64, against every token written out, and against the model of 03 itself."""
    recall_model, _ = floor.build(replace(SMALL, kernel=kernel, floor=0.0 if kernel == "softmax" else 0.5))
    recall_model = recall_model.double()
    short = floor.short_contexts(6, 600, 1.0, seed=5)
    inputs, labels = train_mqar.make_mqar(6, 600, 16, 256, 1.0, seed=5)
    long = floor.written_out(inputs, labels)
    with torch.no_grad():
        found, shares = floor.logits_of(recall_model, short)
        expected, _ = floor.logits_of(recall_model, long)
        by_03 = recall_model.logits_at(inputs, long.positions)
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-12)
    assert torch.allclose(found, by_03, rtol=1e-10, atol=1e-12)
    assert torch.allclose(shares.sum(-1), torch.ones_like(shares[..., 0]))


def test_random_filler_is_filler_and_nothing_else():
    contexts = floor.test_contexts(128, "uniform", random_filler=True)
    plain = floor.test_contexts(128, "uniform", as_written=True)
    is_filler = plain.tokens == 0
    assert torch.equal(contexts.tokens[~is_filler], plain.tokens[~is_filler])
    assert contexts.tokens[is_filler].unique().tolist() == list(range(256, 320))


# Kernels
def test_a_floor_that_is_learned():
    """It starts where it is set, is trained without decay, and can be set to 0 afterwards."""
    recall_model, kernel = floor.build(replace(SMALL, kernel="rebased, learned"))
    assert abs(floor.floor_of(kernel) - 0.5) < 1e-6
    q, k = torch.randn(2, 3, 16)
    kernel.scores(q, k).sum().backward()
    assert abs(kernel.theta.grad.item() - 9 * 2 * kernel.theta.item()) < 1e-5  # nine scores, each θ² more
    decayed, free = floor.parameter_groups(recall_model, SMALL)
    assert free["weight_decay"] == 0 and [p is kernel.theta for p in free["params"]] == [True]
    assert decayed["weight_decay"] == 0.1
    assert len(decayed["params"]) + 1 == len(list(recall_model.parameters()))
    kernel.floor = 0.0
    assert floor.floor_of(kernel) == 0 and kernel.scores(q, k).min() >= 0


def test_gamma_may_be_spared_the_decay():
    recall_model, kernel = floor.build(replace(SMALL, kernel="rebased", floor=0.0))
    _, free = floor.parameter_groups(recall_model, replace(SMALL, decay_gamma=False))
    assert {id(p) for p in free["params"]} == {id(kernel.gamma_q), id(kernel.gamma_k)}
    assert len(floor.parameter_groups(recall_model, SMALL)) == 1


def test_lowest_values_of_the_other_kernels():
    s = torch.arange(-4, 4, 1e-4, dtype=torch.float64)
    q, k = torch.zeros(1, 16, dtype=torch.float64), torch.zeros(len(s), 16, dtype=torch.float64)
    q[0, 0], k[:, 0] = 4, s
    quartic = floor.QuarticKernel(16, floor=0.0).scores(q, k)
    assert -1e-7 < quartic.min() < 1e-7
    taylor = 1 + s + s**2 / 2 + s**3 / 6 + s**4 / 24
    assert torch.allclose(floor.QuarticKernel(16, floor=floor.QuarticKernel.LOWEST).scores(q, k)[0], taylor)
    cosine = floor.CosineKernel(16, floor=0.5).scores(q, torch.randn(50, 16, dtype=torch.float64))
    assert cosine.min() >= 0.5 and cosine.max() <= 1.5


# What is run
def test_parts_differ_in_what_they_say():
    rate = lambda run: 0.01  # noqa: E731
    dose = floor.planned_runs("dose", [0, 1], rate)
    assert len(dose) == len(set(dose)) == 2 * 8 * 2 and {run.floor for run in dose} >= {0.0, 0.5, 1.0}
    assert {run.length for run in floor.planned_runs("trained-at", [0], rate)} == {2048, 8192}
    assert all(run.written_out for run in floor.planned_runs("predict", [0, 1, 2], rate))
    controls = floor.planned_runs("controls", list(range(10)), rate)
    assert len(controls) == len(set(controls)) == 3 * 22 + 10 * 4
    ladder = floor.planned_runs("ladder", [0], rate)
    assert len(ladder) == 17 and ladder[0].kernel == "softmax" and ladder[0].warmup == 100


def test_rates_are_chosen_by_the_training_loss():
    """Not by accuracy; a kernel has one for both floors, a system of the ladder its own."""
    rows = []
    for floor_, losses in ((0.0, (0.3, 0.1)), (0.5, (0.1, 0.2))):
        for rate, loss in zip((0.003, 0.01), losses, strict=True):
            run = floor.Run("based", floor_, 100, rate)
            rows.append(asdict(run) | {"loss": loss, "accuracy": 1 - rate})
    assert floor.best_rates(rows, "128") == {"based": 0.01}
    assert floor.best_rates(rows, "ladder") == {("based", 128, 0.0): 0.01, ("based", 128, 0.5): 0.003}


def test_a_run_learns_and_has_its_row(monkeypatch):
    """40 steps of a small task: the loss falls, and the row survives JSON."""
    monkeypatch.setattr(floor, "TEST_LENGTHS", (128, 512))
    run = floor.Run("rebased, learned", 0.5, 3, 0.01, steps=40, d_model=16, written_out=True)
    monkeypatch.setattr(floor, "WRITTEN_OUT", 512)
    seen = []
    row = floor.run_one(run, lambda *news: seen.append(news))
    row = json.loads(json.dumps(row))
    assert floor.run_of(row) == run and [news[0] for news in seen] == [20, 40]
    assert row["history"][1][1] < row["history"][0][1] and row["floor_at_end"] != 0.5
    assert set(row["cells"]) == {"128 official", "128 uniform", "512 official", "512 uniform"}
    assert row["as_written_out"]["512 uniform"]["equal_verdicts"] == 1.0
    assert set(row["cells_without_floor"]) == set(row["cells"])


def fake_row(run, uniform=0.5, official=0.7, repaired=0.9, loss=0.1):
    """A row of `run_one` that no training was needed for."""
    def cells(values):
        found = {}
        for length in floor.TEST_LENGTHS:
            for placement, accuracy in values.items():
                found[f"{length} {placement}"] = {"accuracy": accuracy, "right": 0.2, "others": 0.3, "filler": 0.4}
        return found

    history = [(20, 4.0, 0.1, 0.5), (40, 0.1, 0.95, 0.004)]
    row = asdict(run) | {"loss": loss, "floor_at_end": 0.004, "history": history, "seconds": 1.0}
    row["cells"] = cells({"official": official, "uniform": uniform})
    if run.floor:
        row["cells_without_floor"] = cells({"official": repaired, "uniform": repaired})
    if run.written_out:
        found = {"short": 0.5, "written_out": 0.5, "equal_verdicts": 0.999, "filler_difference": 1e-8}
        row["as_written_out"] = {"8192 uniform": found}
    return row


def test_the_command_runs_what_is_missing_and_prints(tmp_path, monkeypatch, capsys):
    """All parts, with rows from a stand-in; the second time nothing is run and the same is printed."""
    ran = []

    def run_all(work, runs, steps_of, processes, keep):
        for run in runs:
            ran.append(run)
            keep(run, fake_row(run, uniform=0.3 + run.seed / 1000))

    monkeypatch.setattr(floor.workers, "run_all", run_all)
    arguments = ["--seeds", "0", "1", "--output", str(tmp_path / "rows.jsonl"), "--figure", str(tmp_path / "f.png")]
    floor.main(arguments)
    first = capsys.readouterr().out
    assert len(ran) == len(set(ran)) > 300 and (tmp_path / "f.png").stat().st_size > 10_000
    for name in ("dose:", "learned:", "predict:", "trained-at:", "controls:", "ladder:", "rates:"):
        assert name in first
    count = len(ran)
    floor.main(arguments)
    assert len(ran) == count
    second = capsys.readouterr().out
    assert second.split("dose: accuracy", 1)[1] == first.split("dose: accuracy", 1)[1]


@pytest.mark.parametrize(("arguments", "says"), [
    (["dosis"], "there is no part 'dosis'"),
    (["--seeds", "100"], "choose the learning rates"),
    (["--seeds", "-1"], "a seed is at least 0"),
])
def test_what_cannot_be_run_is_said(arguments, says, capsys, tmp_path):
    with pytest.raises(SystemExit):
        floor.main([*arguments, "--output", str(tmp_path / "rows.jsonl")])
    assert says in capsys.readouterr().err


# Statistics
def test_students_t():
    """From any table of the distribution."""
    for dof, value in ((1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042)):
        assert abs(floor_report.t_quantile(dof) - value) < 2e-3
    middle, half = floor_report.interval([1.0, 2.0, 6.0])
    assert middle == 3 and abs(half - 4.303 * 7**0.5 / 3**0.5) < 5e-3


def test_the_permutation_test_by_hand():
    """All signs of (1, 2, 3): 6 is reached by two of eight; 4 = 3 + 2 - 1 by four; 0 by all."""
    assert floor_report.permutation_p([1, 2, 3]) == 2 / 8
    assert floor_report.permutation_p([-1, 2, 3]) == 4 / 8
    assert floor_report.permutation_p([1, -1]) == 1


def test_a_comparison_has_a_direction():
    line = floor_report.compare([0.1, 0.2, 0.3], [0.4, 0.4, 0.9])
    assert line.startswith("+0.367 [") and "up 3/3" in line and "p 0.250" in line


def test_the_law_and_its_inverse():
    fillers = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64).numpy()
    assert abs(floor_report.mean_share(1.0, fillers) - (0 + 1 / 2 + 3 / 4) / 3) < 1e-12
    assert abs(floor_report.solve_share(floor_report.mean_share(0.02, fillers), fillers) - 0.02) < 1e-9


# Tables
def test_every_number_of_the_dose_stands_in_its_place(capsys):
    """Rows whose every cell differs."""
    rows = []
    for seed in (0, 1):
        rows.append(fake_row(floor.Run("based", 0.0, seed, 0.01), uniform=0.81 + seed / 50, official=0.91 + seed / 50))
        rows.append(fake_row(floor.Run("based", 0.5, seed, 0.01), uniform=0.21 + seed / 50, official=0.51 + seed / 50,
                             repaired=0.71 + seed / 50))
    rows[2]["cells"]["8192 uniform"]["filler"] = 0.66
    floor_report.print_dose(list(reversed(rows)))
    uniform, official = capsys.readouterr().out.split("official queries")
    base, floored = (line for line in uniform.splitlines() if line.startswith("(1+s)²/2"))
    assert base.split()[1:4] == ["0", "2", "0.920"] and "0.820 ± 0.014" in base
    assert "0.220 ± 0.014" in floored and "-0.600 [" in floored and "0.720 ± 0.014" in floored and "+0.500 [" in floored
    assert "0.400" in floored and "0.530" not in floored
    floored = [line for line in official.splitlines() if line.startswith("(1+s)²/2")][1]
    assert "0.520 ± 0.014" in floored and "-0.400 [" in floored and "+0.200 [" in floored
    assert "raises 2 of" in official and "0.220 to 0.720" in official


def test_the_ladder_pairs_a_kernel_with_itself(capsys):
    rows = []
    for seed in (0, 1):
        for kernel, without in (("x2", 0.9), ("based", 0.8)):
            rows.append(fake_row(floor.Run(kernel, 0.0, seed, 0.01), uniform=without))
            rows.append(fake_row(floor.Run(kernel, 0.5, seed, 0.003), uniform=0.3))
    floor_report.print_ladder(rows)
    lines = capsys.readouterr().out.splitlines()
    assert "+0.600" in next(line for line in lines if line.startswith("x² + 0.5"))
    assert "+0.500" in next(line for line in lines if line.startswith("Based "))


def test_without_matplotlib_the_tables_stand(monkeypatch, tmp_path):
    monkeypatch.setattr(lesson, "new_figure", lambda width, height: None)
    floor_report.draw({"dose": []}, tmp_path / "f.png")
    assert not (tmp_path / "f.png").exists()
