"""2c · Decay: a state that forgets                                     (open-ended, 40 minutes)

Connects to 02_linear_attention.py, "3. Recurrent: one token at a time" and
"4. Chunked: quadratic where that is cheap, a state for the rest"; to course/family.md.

RetNet, GLA and Mamba-2 multiply the state by a number below 1 before a token joins it:

    S_i = λ S_{i−1} + φ(k_i) v_iᵀ     z_i = λ z_{i−1} + φ(k_i)     o_i = φ(q_i)ᵀS_i / φ(q_i)ᵀz_i

Write it as a quadratic form: a token n places back has been multiplied n times. Then ask what decay
does to the floor: T fillers no longer weigh T times the floor. But the right key fades, too.

Write
  decayed_quadratic(q, k, v, kernel, decay)              the definition, over T × T weights
  decayed_recurrent(q, k, v, kernel, decay, state=None)  the same from a state, o and State
  share_on_filler(floor, right, decay, T)                what decay does to 01's share

Hint: decay ** (i − j) as a T × T matrix; mind the upper triangle, where the exponent is negative.

Then it is open: look at share_on_filler(0.5, 13, λ, 1000) for λ = 1, .999, .99, .9. Does decay
repair the floor? Mamba-2 and GLA compute λ from the token itself: which λ should filler have? And
write the chunked form: what multiplies the state that a chunk finds, and what each key in it?

Check: python -m pytest course -k 2c
"""

import torch  # noqa: F401

from rebased import EPS, linear_attention  # noqa: F401  (02_linear_attention.py)

def decayed_quadratic(q, k, v, kernel, decay):
    """q, k (B, H, T, D), v (B, H, T, Dv), decay in (0, 1] -> o (B, H, T, Dv)."""
    # Your code.


def decayed_recurrent(q, k, v, kernel, decay, state=None):
    """The same token by token -> o (B, H, T, Dv), linear_attention.State(S, z) after the last."""
    # Your code.


def share_on_filler(floor, right, decay, T):
    """The share of T fillers of weight `floor` that stand between the right key and the query.

    The nearest filler has distance 0 and is not decayed, the farthest has T − 1, and the right key
    has T. No other token counts.
    """
    # Your code.
