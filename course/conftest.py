"""How `python -m pytest course` finds an answer, and how it says what is still wrong with it.

    python -m pytest course -k 2b                                your file in course/exercises/
    python -m pytest course -k 2b --answers course/solutions     the same check on the solution
    python -m pytest course --answers ../mine                    files of the same names, elsewhere
"""

from pathlib import Path

import pytest
import torch

from course.answers import Answer, explain

HERE = Path(__file__).resolve().parent


def pytest_addoption(parser):
    parser.addoption(
        "--answers",
        default=str(HERE / "exercises"),
        metavar="FOLDER",
        help="the folder whose answers are checked (course/exercises)",
    )


def pytest_configure(config):
    torch.set_num_threads(1)  # small sizes: on a busy machine more threads wait for each other


@pytest.fixture
def answer(request):
    """The file that answers the exercise of this check: test_2b_... asks for 2b_*.py."""
    exercise = request.node.name.split("_")[1]
    folder = Path(request.config.getoption("--answers")).resolve()
    files = sorted(folder.glob(f"{exercise}_*.py"))
    if len(files) != 1:
        pytest.fail(f"{folder} should hold one file {exercise}_*.py, it has {len(files)}")
    return Answer(exercise, files[0])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Put a few lines in the place of the traceback."""
    report = yield
    if report.failed:
        folder = Path(item.config.getoption("--answers")).resolve()
        report.longrepr = explain(call.excinfo, folder)
    return report
