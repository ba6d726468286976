"""Solution of 5b: remember where each pair ended last."""

import numpy as np

def far_recall_mask(context, distance):
    """One pass over the context."""
    mask = np.zeros(len(context), dtype=bool)
    ended = {}  # pair: the place of its second token, the latest one
    for t in range(1, len(context)):
        pair = (int(context[t - 1]), int(context[t]))
        if pair in ended and t - ended[pair] >= distance:
            mask[t] = True
        ended[pair] = t
    return mask
