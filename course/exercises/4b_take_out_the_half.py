"""4b · Take the ½ out of your own trained model                                 (20 minutes)

Connects to 04_train_mqar.py, "The floor taken out of trained weights".

The lesson does it once, all or nothing. Train a small model of your own (a second on one core), and
turn its floor down step by step: dose and response.

Write
  my_run()                              the run that you choose
  dose(trained, run, floors, length)    accuracy and share on filler for each floor

Hint: `dataclasses.replace(train_mqar.SMALL, seed=..., mixer=...)` is a run that takes a second; its
kernel must have a floor, as "based", "rebased_floor" or "based_norm" have. `kernel_of` and
`test_at` of 04 do the rest. Leave the model as you found it.

Before you look: will the accuracy rise in proportion to what is taken away? At which floor is most
of it back, and what is that floor to be compared with?

Check: python -m pytest course -k 4b
"""

from dataclasses import replace  # noqa: F401

from rebased import train_mqar  # noqa: F401  (04_train_mqar.py)

def my_run():
    """A `train_mqar.Run` with a seed above 0; at most 500 steps of at most 32 examples."""
    # Your code.


def dose(trained, run, floors, length):
    """Test the trained model at this length, uniform queries, with each of the floors.

    Returns a list of (floor, accuracy, share on filler), in the order of `floors`. The floor that
    the model had is set again at the end.
    """
    # Your code.
