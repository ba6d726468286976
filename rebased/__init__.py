"""What the lessons call and users import.

The lessons have names that start with a digit, which cannot follow `import`. Here they have plain ones, and are
loaded when they are asked for:

    from rebased import kernels, linear_attention, model
"""

import sys
from importlib import import_module
from pathlib import Path

LESSONS = {
    "kernels": "01_kernels",
    "linear_attention": "02_linear_attention",
    "model": "03_model",
    "train_mqar": "04_train_mqar",
    "train_pile": "05_train_pile",
}

EPS = 1e-12  # added to every normaliser, in every form; 01_kernels.py argues for its size


def __getattr__(name):
    """The lesson of this plain name. A lesson that runs as a script right now is not loaded a second time."""
    if name not in LESSONS:
        raise AttributeError(f"module 'rebased' has no attribute {name!r}; the lessons are {', '.join(LESSONS)}")
    file = Path(__file__).resolve().parent.parent / f"{LESSONS[name]}.py"
    main = sys.modules["__main__"]
    running = getattr(main, "__file__", None)
    if running and Path(running).resolve() == file:
        return main
    return import_module(LESSONS[name])
