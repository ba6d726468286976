"""5b · AR tokens that need a long memory                                         (20 minutes)

Connects to 05_train_pile.py, "Which tokens could be recalled"; 04_train_mqar.py, "What it does not
say".

A pair of tokens that occurred three tokens ago is easy: the convolution has it. If the floor of
Based costs anything in text, then on tokens whose pair was last seen far away. Mark these.

Write
  far_recall_mask(context, distance)    the AR tokens by `bigram` whose pair is that far away

Hint: go through the context from left to right and remember for every pair where it ended last. A
dictionary does it. (With numpy alone: sort the pairs, stably, and compare neighbours.)

Check: python -m pytest course -k 5b
"""

import numpy as np  # noqa: F401

from rebased import train_pile  # noqa: F401  (05_train_pile.py)

def far_recall_mask(context, distance):
    """Tokens (n,) -> bool (n,): which of them end a pair that was last seen far away.

    Token t is marked if the pair (t − 1, t) occurred before, and its latest earlier occurrence
    ended at t − distance or before. With distance = 1 this is `recall_mask(context, "bigram")`.
    """
    # Your code.
