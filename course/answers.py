"""What the checks of the exercises share: load an answer, ask it, compare what it says.

No run of its own; see conftest.py beside it.
"""

import importlib.util
import traceback

import pytest
import torch

class Answer:
    """The file of one exercise, loaded: `answer.ask("name", ...)` calls its function `name`."""

    def __init__(self, exercise, path):
        self.exercise = exercise
        self.path = path
        spec = importlib.util.spec_from_file_location(f"answer_{exercise}", path)
        self.module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)

    def get(self, name):
        """The function or class `name`; an AssertionError says that it is missing."""
        assert hasattr(self.module, name), f"{self.path.name} has no {name} any more; put it back"
        return getattr(self.module, name)

    def ask(self, name, *arguments, **options):
        """What `name` returns; an AssertionError says that its body is still to be written."""
        found = self.get(name)(*arguments, **options)
        todo = f"{name} returns None: its body is yours to write, in {self.path}"
        assert found is not None, todo
        return found


def agree(found, expected, what, tolerance=1e-9):
    """Assert that a tensor has the shape and the values of `expected`: what (str) was compared."""
    is_tensor = isinstance(found, torch.Tensor)
    assert is_tensor, f"{what} should be a tensor, it is {type(found).__name__}"
    shapes = f"{tuple(found.shape)}, it should be {tuple(expected.shape)}"
    assert found.shape == expected.shape, f"{what} has the shape {shapes}"
    assert torch.isfinite(found).all(), f"{what} is not finite everywhere"
    error = (found.double() - expected.double()).norm().item()
    size = expected.double().norm().item()
    relative = error / size if size > 0 else error
    assert relative <= tolerance, f"{what} is off by {relative:.1e} of its size"


def explain(excinfo, folder):
    """An exception as a few lines: of an assertion its message, of others the line of the answer.

    excinfo: pytest's. folder: where the answers lie.
    """
    error = excinfo.value
    message = str(error) or type(error).__name__
    if isinstance(error, SyntaxError):
        line = (error.text or "").strip()
        return f"{error.filename}, line {error.lineno}: {line}\nSyntaxError: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename.startswith(str(folder))]
    if own and not isinstance(error, AssertionError):
        frame = own[-1]
        place = f"{frame.filename}, line {frame.lineno}: {frame.line}"
        return f"{place}\n{type(error).__name__}: {message}"
    if isinstance(error, AssertionError) or isinstance(error, pytest.fail.Exception):
        return message
    return f"The check could not use what your code returned. {type(error).__name__}: {message}"
