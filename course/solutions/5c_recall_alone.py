"""Solution of 5c: the longest match, what was counted, and a little for everything."""

import numpy as np

LONGEST = 12


def predict(context):
    """A mixture: the longer the match, the surer."""
    seen = np.frombuffer(context, dtype=np.uint8)
    counts = np.bincount(seen, minlength=256)
    p = 0.9 * (counts + 0.01) / (len(context) + 2.56) + 0.1 / 256
    for length in range(LONGEST, 0, -1):
        place = context.rfind(context[-length:], 0, len(context) - 1)
        if len(context) > length and place >= 0:
            trust = length / (length + 1.5)
            p = (1 - trust) * p
            p[context[place + length]] += trust
            break
    return p
