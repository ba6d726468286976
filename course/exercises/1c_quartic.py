"""1c · The quartic kernel, and what a state may cost                    (open-ended, 40 minutes)

Connects to 01_kernels.py, "Features of any polynomial of degree two" and
"What a floor costs in a long context"; to 02_linear_attention.py,
"3. Recurrent: one token at a time".

    sim(q, k) = s⁴,  s = q·k / √D

Keys near the zero of a square still weigh something: 01 scatters them by 0.05 in s, and they take
.56 of the attention at T = 8,192. A fourth power is flatter at its zero and steeper far away. What
does it cost? Its features are products of four numbers.

Write
  QuarticKernel    a class like those of 01: its features, and its scores without them
  compare(T)       {"Based": (P, share), "ReBased": (P, share), "quartic": (P, share)}

First way: s⁴ = (s²)², so `symmetric_products` twice. That is right, but at D = 4 it makes 55
features where 35 are enough: (x₁x₂)·(x₃x₄) and (x₁x₃)·(x₂x₄) are the same number.
The second way is asked for here.
Hint: one feature for each *multiset* of four places, a ≤ b ≤ c ≤ d
(itertools.combinations_with_replacement), times the root of how often it stands in the fourfold
sum: 4! / (n₁! n₂! ...), where n₁, n₂, ... say how often each place occurs in it.

Then it is open: a state holds P·(Dv + 1) numbers a head. Is the quartic one worth it? Could a
kernel have a flat zero and few features? (One that is cheap: feed fewer dimensions to it.)

Check: python -m pytest course -k 1c
"""

from itertools import combinations_with_replacement  # noqa: F401

from rebased import kernels  # 01_kernels.py

class QuarticKernel(kernels.Kernel):
    """sim = s⁴ + floor. P = D(D+1)(D+2)(D+3)/24 (+ 1 with floor)."""

    def features(self, x):
        """φ(x): (..., D) -> (..., P), with φ(q)·φ(k) = (q·k/√D)⁴."""
        # Your code.

    def scores(self, q, k):
        """s⁴ + floor by `kernels.scaled_dot`: q (..., N, D), k (..., T, D) -> (..., N, T)."""
        # Your code.


def compare(T):
    """For D = 16: P, and the share of T irrelevant keys that are scattered by 0.05.

    Hint: `kernels.irrelevant_share(scores, T, scatter)`; P is `num_features`.
    """
    # Your code.
