"""3c · The delta rule: a state that corrects itself                      (open-ended, 45 minutes)

Connects to 03_model.py, "Attention as a mixer" and "One description of a model"; to
02_linear_attention.py, "3. Recurrent: one token at a time"; to course/family.md.

A sum never forgets: write a key twice, with two values, and reading gives their mean. The delta
rule (DeltaNet) first reads what the state says about a key, and writes only the difference:

    S ← S + b · k̂ (v − Sᵀk̂)ᵀ        o = Sᵀ q̂        k̂ = k/|k|, q̂ = q/|q|

b, between 0 and 1, says how much of the difference is written. There is no normaliser, so no weight
that must be positive, and no floor.

Write
  delta_recurrent(q, k, v, b, S=None)   the rule, token by token
  DeltaMixer(config)                    a mixer of 03 around it, which calls delta_recurrent

Hint: look at KernelAttention of 03. The projections are the same; b is one number a head and token,
`sigmoid(Linear(d_model -> heads))` of the input. The state is S alone.

Then it is open: the check puts DeltaMixer into MIXERS under the name "delta". Do the same in a
script and train it by `train_mqar.train(Run("delta", ...))` of 04 on pairs that are written anew.
And what would a chunked form have to solve, when each write depends on the one before?

Check: python -m pytest course -k 3c
"""

import torch  # noqa: F401
import torch.nn as nn
import torch.nn.functional as F  # noqa: F401

def delta_recurrent(q, k, v, b, S=None):
    """q, k (B, H, T, D), v (B, H, T, Dv), b (B, H, T), S (B, H, D, Dv) or None (zeros).

    Returns o (B, H, T, Dv) and S after the last token.
    """
    # Your code.


class DeltaMixer(nn.Module):
    """A mixer: x (B, T, d_model) -> y (B, T, d_model). State: S (B, H, D, Dv)."""

    def __init__(self, config):
        super().__init__()
        # Your code: config.d_model, config.heads, config.feature_dim (D).

    def forward(self, x, state=None, return_state=False):
        """y, or y and the next state with return_state."""
        # Your code.
