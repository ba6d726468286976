"""The specification of 02_linear_attention_cost.py: what is counted, and what its sentences say when forms are missing."""

from importlib import import_module

import pytest

cost = import_module("02_linear_attention_cost")
SPEED = (1e11, 1e10, 5e-6)  # FLOP/s, bytes/s, seconds of a call


@pytest.mark.parametrize("check", cost.CHECKS, ids=lambda check: check.__name__)
def test_claims_of_the_file(check):
    check()


def test_what_binds_each_form():
    """A long quadratic or linear form waits for memory, a recurrence for its calls."""
    bound = {form: cost.predict(form, 8192, SPEED).bound for form in cost.FORMS}
    assert bound["quadratic"] == bound["linear"] == "memory" and bound["recurrent"] == "calls"
    assert cost.predict("softmax", 65_536, SPEED).bound == "arithmetic"


def test_four_times_the_tokens():
    """Predicted seconds: 16 times for the quadratic form, 4 for the others, but for what does not grow."""
    for form, ratio in (("quadratic", 16), ("linear", 4), ("recurrent", 4), ("chunked", 4)):
        short, long = (cost.predict(form, T, SPEED).seconds for T in (16_384, 65_536))
        assert long / short == pytest.approx(ratio, rel=0.02), form


@pytest.mark.parametrize("rows", [[], [("chunked", 2048, 1.0, None)], [("chunked", 128, 1.0, 2.0), ("linear", 512, 1.0, 3.0)]])
def test_the_reading_does_without_what_was_not_run(rows, capsys):
    cost.read_table(rows)
    assert "times as long as the chunked" not in capsys.readouterr().out


def test_the_reading_says_what_was_measured(capsys):
    cost.read_table([("chunked", 2048, 0.5, 1.0), ("quadratic", 2048, 1.0, 20.0), ("chunked", 8192, 2.0, 4.2)])
    out = capsys.readouterr().out
    assert "At T = 2,048 the quadratic form takes 20 times as long" in out and "takes 4.2 times as long" in out
    assert "Measured over predicted: 2.0 to 20.0." in out


def test_turns_are_taken():
    """Contenders alternate, the first turn is not counted."""
    order = []
    times = cost.interleaved({name: lambda name=name: order.append(name) for name in "ab"}, repeats=3)
    assert order == list("ab" * 4) and set(times) == {"a", "b"}
