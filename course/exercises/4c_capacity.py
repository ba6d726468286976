"""4c · How much does a state hold? Recall against pairs and D            (open-ended, 45 minutes)

Connects to 04_train_mqar.py, "What it does not say"; 02_linear_attention.py, "3. Recurrent: one
token at a time"; 01_kernels.py, "Two relatives".

So far T grew and the number of pairs stayed. Now nothing is filler: K random pairs go into one
state, and each key is asked for once. No training. All that limits recall is what other keys weigh.

    keys k_j ~ N(0, 1) of D numbers       values v_j: signs +1 or −1, value_dim of them
    S = Σ_j φ(k_j) v_jᵀ    z = Σ_j φ(k_j)        o_j = φ(k_j)ᵀ S / φ(k_j)ᵀ z
    answer: the value, of all K, with the largest inner product with o_j

Write
  recall(kernel, num_pairs, value_dim, seed)   the share of keys that get their own value back
  capacity(kernel, value_dim)                  the largest K = 2, 4, 8, ... with recall >= .5
  table(value_dim)                             {(name, D): capacity} for three kernels, three D

Hint: the inner products of all outputs with all values are one matrix product, and `argmax` along
its rows is the answer.

Then it is open. By which factor does the capacity of s² grow when D doubles, and that of elu + 1?
Compare it with P. Which of Based and ReBased is ahead at K = 256, D = 16, and why? Where does the
quartic kernel of 1c stand? Does training change it: `Run("rebased", ..., pairs=..., d_model=...)`?

Check: python -m pytest course -k 4c
"""

import torch

from rebased import kernels  # noqa: F401  (01_kernels.py)

@torch.no_grad()
def recall(kernel, num_pairs, value_dim, seed=0):
    """The share of `num_pairs` random pairs that one state gives back: a float from 0 to 1.

    Other seeds draw other keys and values.
    """
    # Your code.


def capacity(kernel, value_dim=32):
    """The largest K among 2, 4, 8, ... whose recall, a mean over 10 seeds, is .5 or more.

    1 if there is none. Stop at the first K that is below.
    """
    # Your code.


def table(value_dim=32):
    """{(name, D): capacity} for "elu", "based" and "rebased" and for D = 4, 8 and 16."""
    # Your code.
