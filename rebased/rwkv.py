"""RWKV, version 4: a mean of past values whose weights decay, each channel at its own rate. First a loop, then fast.

Equations                                                                                         [1, section 3.1.2]
  y_t = (Σ_{j<t} e^{(t−1−j)w + k_j} v_j + e^{c + k_t} v_t) / (the same with 1 for v);   w = −e^decay < 0, c = first
  Two recurrences with one decay:  num ← e^w num + e^k v,  den ← e^w den + e^k

Letters: B batch, T time, E channels (d_model). RWKV's own u is called `first`: the weight of a token when it is new.
  In the scan time comes first, (T, B, E): one step is then a run of memory.

References
  [1] Peng et al., RWKV: Reinventing RNNs for the Transformer Era, EMNLP Findings 2023, arXiv 2305.13048; their code:
      github.com/BlinkDL/RWKV-LM, RWKV-v4neo.
  [2] github.com/corl-team/rebased: the block that the paper on ReBased compares with.
"""

import math

import torch
import torch.nn as nn

from rebased.autograd import refuse_transforms, without_autocast
from rebased.scan import Recurrence

# The layer as a loop: the equations read aloud, and the oracle of the tests
def rwkv_loop(layer, x):
    """What `layer`, an RWKV, computes, token by token: x (B, T, d_model) -> y of the same shape.

    Exponentials as they stand: for float64 and keys of moderate size.
    """
    fade = torch.exp(-torch.exp(layer.decay))  # e^w, (E,)
    before = torch.zeros_like(x[:, 0])
    num = torch.zeros_like(before)
    den = torch.zeros_like(before)
    outputs = []
    for now in x.unbind(1):  # (B, E)
        # Key, value and receptance see a mixture of this token and the one before it.
        k = layer.key(layer.mix_k * now + (1 - layer.mix_k) * before)
        v = layer.value(layer.mix_v * now + (1 - layer.mix_v) * before)
        r = layer.receptance(layer.mix_r * now + (1 - layer.mix_r) * before)
        # y_t: all before, and this token by its own weight
        own = torch.exp(layer.first + k)
        y = (num + own * v) / (den + own)
        outputs.append(layer.out(torch.sigmoid(r) * y))
        # The past fades by e^w, and this token joins it.
        num = fade * num + torch.exp(k) * v
        den = fade * den + torch.exp(k)
        before = now
    return torch.stack(outputs, dim=1)


# The fast scan: a quotient that cannot overflow
# e^k overflows float32 at k = 89. So the sums are kept as e^{−m} num and e^{−m} den, where m_t = max(m_{t−1} + w, k_t)
# is the largest exponent so far. Any m gives the same quotient, so no gradient flows through it; and whatever the
# inputs, den ≥ 1 where it is read.
def running_max(w, m):
    """In place: row t of m (T+1, B, E) becomes max(m_t, (row t−1) + w), t = 1..T.

    `solve` of rebased/scan.py with max for + and + for ×.
    """
    T = len(m) - 1
    odd = m[1::2]
    odd.clamp_(min=m[:T:2] + w)
    if T > 2:
        running_max(2 * w, odd)
    if T > 1:
        m[2::2].clamp_(min=m[1:T:2] + w)


@torch.compiler.disable  # its passes in place are no graph that torch.compile could follow
def wkv(k, v, decay, first, h, m):
    """k, v (T, B, E), decay, first (E,), h (B, 2, E), m (B, E) -> y (T, B, E), and h, m after token T. [1, 3.1.2]

    h holds e^{−m} num and e^{−m} den. In float32, or float64 if k is, whatever autocast says; y comes back in k's type.
    """
    refuse_transforms("rwkv_loop of rebased/rwkv.py")
    dtype = torch.promote_types(k.dtype, torch.float32)
    with without_autocast(k.device):
        y, h, m = wkv_in_full(*[x.to(dtype) for x in (k, v, -decay.exp(), first, h, m)])
    return y.to(k.dtype), h, m


def wkv_in_full(k, v, w, first, h, m):
    """`wkv` with w = −e^decay, in the type of its inputs."""
    with torch.no_grad():
        m = torch.cat([m.unsqueeze(0), k])  # (T+1, B, E)
        running_max(w, m)
        largest = torch.maximum(m[:-1], first + k)  # of the exponents in the quotient of each token
    a = torch.exp(m[:-1] + w - m[1:])  # how the sums before shrink, at most 1
    scale = torch.exp(k - m[1:])  # how the token joins, at most 1
    joins = torch.stack([scale * v, scale], dim=2)  # (T, B, 2, E)
    H = Recurrence.apply(a.unsqueeze(2), joins, h)  # (T+1, B, 2, E)
    num, den = H[:-1].unbind(2)  # before each token
    old = torch.exp(m[:-1] - largest)
    new = torch.exp(first + k - largest)
    y = (old * num + new * v) / (old * den + new)
    return y, H[-1], m[-1]


# The layer
class RWKV(nn.Module):
    """Time mixing of RWKV, version 4: x (B, T, d_model) -> y of the same shape. [1, section 3.1]

    State: the last input (B, E), e^{−m} num and den (B, 2, E), and m (B, E): 4 numbers a channel, at any T.
    4d² + 5d parameters: four projections; decay, first, and the shares of a token in key, value and receptance.
    How a channel starts depends on `layer` (0 is the lowest) of `layers`, as in [1]'s code: lower layers look less far
    back.
    """

    def __init__(self, d, layer, layers):
        super().__init__()
        self.key = nn.Linear(d, d, bias=False)
        self.value = nn.Linear(d, d, bias=False)
        self.receptance = nn.Linear(d, d, bias=False)
        self.out = nn.Linear(d, d, bias=False)
        depth = layer / max(1, layers - 1)  # from 0 to 1
        left = 1 - layer / layers  # from 1 to nearly 0
        channel = torch.arange(d) / d
        # A model draws every nn.Linear anew; these five are none and stay as they are.
        self.decay = nn.Parameter(-5 + 8 * torch.linspace(0, 1, d) ** (0.7 + 1.3 * depth))  # e^w from .993 to e^−20
        self.first = nn.Parameter(math.log(0.3) + ((torch.arange(d) + 1) % 3 - 1) * 0.5)
        self.mix_k = nn.Parameter(channel**left)
        self.mix_v = nn.Parameter(channel**left + 0.3 * depth)
        self.mix_r = nn.Parameter(channel ** (0.5 * left))

    def forward(self, x, state=None, return_state=False):
        x = x.transpose(0, 1)  # (T, B, E)
        if state is None:
            last = torch.zeros_like(x[0])
            state = last, torch.stack([last, last], dim=1), torch.full_like(last, -math.inf)
        last, h, m = state
        before = torch.cat([last.unsqueeze(0), x[:-1]])  # (T, B, E)
        k = self.key(torch.lerp(before, x, self.mix_k))
        v = self.value(torch.lerp(before, x, self.mix_v))
        r = self.receptance(torch.lerp(before, x, self.mix_r))
        y, h, m = wkv(k, v, self.decay, self.first, h, m)
        y = self.out(torch.sigmoid(r) * y).transpose(0, 1)
        if not return_state:
            return y
        return y, (x[-1].clone(), h.clone(), m.clone())  # clones: views would keep all T rows in memory


class RWKVBlock(nn.Module):
    """x + RWKV(LayerNorm(x)), then x + LayerNorm(x): the block of the paper's recall models. [2, src/model.py]

    For `BLOCKS` of 03_model.py; of the config it reads d_model and the number of layers, len(mixers). State: that of
    `RWKV`. It has no MLP: raises ValueError if the config asks for one.
    """

    def __init__(self, config, layer):
        super().__init__()
        if getattr(config, "mlp", 0):
            raise ValueError(f"the block of RWKV has no MLP; build it with mlp=0, not {config.mlp}")
        self.norm1 = nn.LayerNorm(config.d_model, eps=1e-5)
        self.norm2 = nn.LayerNorm(config.d_model, eps=1e-5)
        self.mixer = RWKV(config.d_model, layer, len(config.mixers))

    def forward(self, x, state=None, return_state=False):
        if not return_state:
            x = x + self.mixer(self.norm1(x), state)
            return x + self.norm2(x)
        y, state = self.mixer(self.norm1(x), state, return_state=True)
        x = x + y
        return x + self.norm2(x), state
