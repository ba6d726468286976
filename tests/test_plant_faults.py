"""tests/plant_faults.py: every record fits the repository as it is, and what it prints can be believed."""

import pytest
from plant_faults import FAULTS, main, problem_of, report, verdict

def test_every_fault_can_be_planted():
    """A text that changed has to be changed there, too: the message says which."""
    problems = [problem for fault in FAULTS if (problem := problem_of(fault))]
    assert not problems, "\n".join(problems)


def test_there_are_enough_and_none_twice():
    planted = [fault for fault in FAULTS if not fault.same]
    assert len(planted) >= 100
    assert len({(fault.file, fault.text, fault.instead) for fault in FAULTS}) == len(FAULTS)
    assert len({(fault.file, fault.what) for fault in FAULTS}) == len(FAULTS)
    for fault in planted:
        assert fault.tests, fault.what


def test_a_record_that_does_not_fit_is_named_in_one_line(tmp_path):
    fault = FAULTS[0]
    for changes in ({"text": "is not there"}, {"text": "\n"}, {"file": "06_more.py"}, {"tests": "test_06.py"}):
        problem = problem_of(fault._replace(**changes))
        assert "mend the record of this fault" in problem and len(problem.splitlines()) == 1


@pytest.mark.parametrize("arguments, message", [
    (["--only", "no such word"], "no fault has 'no such word'"), (["--processes", "0"], "must be at least 1"),
])
def test_bad_input_is_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_only_a_failed_test_kills():
    """Tests that pass let a fault survive; a run that says nothing stops everything."""
    assert verdict(0, "3 passed") == "SURVIVED"
    assert verdict(1, "...\nFAILED tests/test_x.py::test_y[3] - assert 1\n") == "killed by test_x.py::test_y[3]"
    assert verdict(2, "ERROR tests/test_x.py - SyntaxError\n") == "killed by test_x.py"
    for status, output in ((5, "no tests ran"), (4, "ERROR: file not found"), (1, "")):
        with pytest.raises(SystemExit, match="without a verdict"):
            verdict(status, output)


def test_the_last_lines_count_by_file(capsys):
    first, second = FAULTS[0], next(fault for fault in FAULTS if fault.file != FAULTS[0].file)
    report([(first, "killed by x"), (first, "SURVIVED"), (second, "killed by the time limit of 9 s")])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [first.file, "1", "/", "2"] in lines and [second.file, "1", "/", "1"] in lines
    assert lines[-1] == ["in", "total", "2", "/", "3", "66.7%"]
