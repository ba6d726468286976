"""The specification of 01_kernels.py."""

from importlib import import_module

import pytest
import torch

kernels = import_module("01_kernels")
NAMES = list(kernels.all_kernels(4))


@pytest.mark.parametrize("check", kernels.CHECKS, ids=lambda check: check.__name__)
def test_claims_of_the_file(check):
    check()


@pytest.mark.parametrize("dim", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("name", NAMES)
def test_features_are_the_scores(name, dim):
    """Also between a few queries and many keys, with leading dimensions."""
    torch.manual_seed(dim)
    kernel = kernels.all_kernels(dim)[name]
    q, k = torch.randn(2, 3, 4, dim, dtype=torch.float64), torch.randn(2, 3, 9, dim, dtype=torch.float64)
    scores = kernel.scores(q, k)
    assert scores.shape == (2, 3, 4, 9)
    torch.testing.assert_close(kernel.features(q) @ kernel.features(k).mT, scores, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_scores_by_hand(name):
    """Each formula once more, written out without the code of the file."""
    torch.manual_seed(0)
    q, k = torch.randn(5, 16, dtype=torch.float64), torch.randn(7, 16, dtype=torch.float64)
    s = torch.einsum("id,jd->ij", q, k) / 4
    expected = {
        "based": 1 + s + s**2 / 2,
        "based_norm": 1 + s + s**2 / 2,
        "based_no_floor": 0.5 + s + s**2 / 2,
        "based_norm_no_floor": 0.5 + s + s**2 / 2,
        "elementwise": torch.einsum("id,jd->ij", q**2, k**2),
        "elementwise_floor": torch.einsum("id,jd->ij", q**2, k**2) + 0.5,
        "elu": torch.einsum("id,jd->ij", torch.where(q > 0, q + 1, q.exp()), torch.where(k > 0, k + 1, k.exp())),
    }.get(name, s**2 + 0.5 if name.endswith("_floor") else s**2)
    torch.testing.assert_close(kernels.all_kernels(16)[name].scores(q, k), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_coefficients_are_those_of_the_scores(name):
    kernel = kernels.all_kernels(16)[name]
    if name in ("elu", "elementwise", "elementwise_floor"):
        assert kernel.coefficients is None
        return
    expected = {
        "based": (1, 1, 0.5),
        "based_norm": (1, 1, 0.5),
        "based_no_floor": (0.5, 1, 0.5),
        "based_norm_no_floor": (0.5, 1, 0.5),
    }
    assert kernel.coefficients == expected.get(name, (0.5 if name.endswith("_floor") else 0, 0, 1))
    s = torch.linspace(-3, 3, 7, dtype=torch.float64)
    c0, c1, c2 = kernel.coefficients
    torch.testing.assert_close(kernels.weights_at(kernel.scores, s), c0 + c1 * s + c2 * s**2)


def test_no_cancellation_near_the_lowest_point():
    """At s = −1 + 1e-4 Based − ½ is 5e-9; float32 must not lose it in a sum of numbers near 1."""
    s = torch.tensor([-1 + 2.0**-13])
    weight = kernels.weights_at(kernels.TaylorKernel(16, floor=0.0).scores, s)
    torch.testing.assert_close(weight, torch.tensor([2.0**-27]), rtol=1e-3, atol=0)


@pytest.mark.parametrize("variant", kernels.LADDER)
def test_prepare_by_hand(variant):
    """γ·norm(x) + β over all heads jointly, with only the steps of the variant."""
    torch.manual_seed(0)
    kernel = kernels.ReBasedKernel(4, heads=3, variant=variant)
    for parameter in kernel.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 5, 12) * 3 + 1
    q, k = kernel.prepare(x, x)
    for prepared, side in ((q, "q"), (k, "k")):
        y = x
        if "norm" in kernels.LADDER[variant]:
            y = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5)
        if "gamma" in kernels.LADDER[variant]:
            y = y * getattr(kernel, f"gamma_{side}")
        if "beta" in kernels.LADDER[variant]:
            y = y + getattr(kernel, f"beta_{side}")
        torch.testing.assert_close(prepared, y)


def test_parameters_of_rebased():
    """Two LayerNorms of heads·dim: 768 parameters at 12 heads of 16, as in the paper's tables."""
    count = sum(p.numel() for p in kernels.ReBasedKernel(16, heads=12).parameters())
    assert count == 768
    assert sum(p.numel() for p in kernels.TaylorKernel(16, heads=12).parameters()) == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: kernels.TaylorKernel(0),
        lambda: kernels.ReBasedKernel(16, heads=0),
        lambda: kernels.ReBasedKernel(2.5),
        lambda: kernels.ReBasedKernel(16, floor=-1.0),
        lambda: kernels.TaylorKernel(16, floor=float("nan")),
        lambda: kernels.ReBasedKernel(16, variant="cubed"),
        lambda: kernels.ReBasedKernel(16).features(torch.randn(3, 15)),
        lambda: kernels.ReBasedKernel(16).scores(torch.randn(3, 16), torch.randn(3, 8)),
        lambda: kernels.ReBasedKernel(16, heads=2).prepare(torch.randn(1, 3, 16), torch.randn(1, 3, 32)),
        lambda: kernels.exp_scores(torch.randn(3, 4), torch.randn(3, 5)),
        lambda: kernels.exp_scores(torch.randn(3, 0), torch.randn(3, 0)),
    ],
)
def test_impossible_sizes_are_named(make):
    with pytest.raises(ValueError) as error:
        make()
    assert str(error.value).count("\n") <= 1


@pytest.mark.parametrize("bad", [torch.ones(3, 16, dtype=torch.int64), "text", None])
def test_other_types_are_named(bad):
    with pytest.raises(TypeError, match="floating-point"):
        kernels.ReBasedKernel(16).features(bad)


def test_main_prints_the_table_and_draws(tmp_path, capsys):
    figure = tmp_path / "deep" / "figure.png"
    assert kernels.main(["--figure", str(figure)]) == 0
    out = capsys.readouterr().out
    assert "ReBased + ½" in out and out.rstrip().endswith(f"checks: {len(kernels.CHECKS)} passed, 0 failed")
    assert figure.stat().st_size > 10_000


def test_main_without_matplotlib(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert kernels.main(["--figure", str(tmp_path / "figure.png")]) == 0
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert not (tmp_path / "figure.png").exists()


def test_a_failed_claim_is_the_exit_status(capsys):
    def check_that_two_is_three():
        raise AssertionError("it is not")

    assert kernels.run_checks([check_that_two_is_three]) == 1
    assert "FAILED  that two is three: it is not\nchecks: 0 passed, 1 failed" in capsys.readouterr().out


DRAW = ["01_kernels", "02_linear_attention", "02_linear_attention_cost", "04_train_mqar"]
REST = ["02_linear_attention_chunked", "03_baselines", "03_model", "04_mqar_data", "04_mqar_sweep"]


@pytest.mark.parametrize("file", DRAW + REST)
def test_unwritable_output_and_unknown_options_end_at_once(file, capsys):
    with pytest.raises(SystemExit) as stop:
        import_module(file).main(["--figure" if file in DRAW else "--no-such-option", "/dev/null/figure.png"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].count("error:") == 1


@pytest.mark.parametrize("file", DRAW + REST)
def test_help_explains(file, capsys):
    with pytest.raises(SystemExit) as stop:
        import_module(file).main(["--help"])
    assert stop.value.code == 0 and len(capsys.readouterr().out) > 100


def test_a_notebook_has_arguments_of_its_own(monkeypatch):
    """In a notebook sys.argv is the kernel's: it must not reach the parser."""
    import argparse
    import sys

    monkeypatch.setitem(sys.modules, "ipykernel", object())
    monkeypatch.setattr(sys, "argv", ["launcher", "-f", "kernel.json"])
    assert kernels.parse_arguments(argparse.ArgumentParser(), None) is not None
