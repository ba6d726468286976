"""03 · The model: short convolution, attention, and decoding with a state that does not grow

Aim: put the kernels into a language model that trains like a transformer and speaks like a recurrent network.

You will learn
  1. what the layer below the attention does: a convolution of width 3 tells a token what came just before it;
  2. where `prepare` sits in a mixer, and how little separates softmax, Based and ReBased;
  3. how one `forward` serves training, prefill and decoding: it takes a state and returns the next;
  4. that a few labels need a few rows: with `positions`, the last layer computes those rows only.

Equations
  short convolution   y = conv3(u) ⊙ Linear(u) + u, causal, depthwise, no activation              [P App. A, C]
  block               x ← x + mixer(norm(x)),  then  x ← x + mlp(norm(x))                         pre-norm
  without an mlp      the second line is x ← x + norm(x): the paper's MQAR model is built so, which is why its
                      parameter counts hold five LayerNorms                                       [C src/model.py]
  SwiGLU              mlp(x) = W₃ (silu(W₁x) ⊙ W₂x)                                               [S]

Letters: as in 02; d_model the width of the model, V the vocabulary, n the number of positions asked for.

References: [P], [C], [K] as in 01; [S] Shazeer, GLU Variants Improve Transformer, arXiv 2002.05202.

Run: python 03_model.py      (10 seconds: bytes and milliseconds per decoded token, checks)
     python 03_model.py --benchmark      (1 minute: batch 1 and 32, contexts up to 65,536)
"""
# %%
import argparse
import math
import sys
from dataclasses import dataclass
from importlib import import_module

import torch
import torch.nn as nn
import torch.nn.functional as F

kernels = import_module("01_kernels")
linear_attention = import_module("02_linear_attention")
cost = import_module("02_linear_attention_cost")
baselines = import_module("03_baselines")

# %% One description of a model
# Everything that distinguishes the models of 04 and 05 is a field here, nothing else is.
KERNEL_NAMES = tuple(kernels.all_kernels(1))
BASELINES = ("mamba", "rwkv")
MIXER_NAMES = ("short_conv", "gated_conv", "attention", *KERNEL_NAMES, *BASELINES)


@dataclass(frozen=True)
class ModelConfig:
    """A language model. Raises ValueError for settings that cannot be built.

    mixers: one name per layer; heads and feature_dim (D) are those of the attention layers; positions: how many
    learned positions (0: none); norm "layer" or "rms"; mlp: inner size of SwiGLU (0: none); bias: in softmax
    projections; init "paper" (N(0, 0.02), [C]) or "wide" (see `LanguageModel`).
    """

    mixers: tuple[str, ...]
    vocab_size: int
    d_model: int
    heads: int = 1
    feature_dim: int = 16
    positions: int = 0
    norm: str = "layer"
    mlp: int = 0
    bias: bool = False
    init: str = "paper"
    dropout: float = 0.0
    attention_dropout: float = 0.0

    def __post_init__(self):
        for name in self.mixers:
            if name not in MIXER_NAMES:
                raise ValueError(f"unknown mixer {name!r}; choose from {', '.join(MIXER_NAMES)}")
        for field in ("vocab_size", "d_model", "heads", "feature_dim"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        if not self.mixers or self.positions < 0 or self.mlp < 0:
            raise ValueError("a model needs at least one mixer, and positions and mlp must not be negative")
        if self.norm not in ("layer", "rms") or self.init not in ("paper", "wide"):
            raise ValueError(f"norm is 'layer' or 'rms', init 'paper' or 'wide'; got {self.norm!r}, {self.init!r}")
        if self.d_model < self.heads or ("attention" in self.mixers and self.d_model % self.heads):
            raise ValueError(f"{self.heads} heads do not fit into d_model {self.d_model}")
        if not (0 <= self.dropout < 1 and 0 <= self.attention_dropout < 1):
            raise ValueError("dropout and attention_dropout must lie in [0, 1)")

# %% A mixer moves information between positions
# All mixers share one signature: forward(x, state=None, keep=False, positions=None) -> (y, state). x (B, T, d_model)
# continues after `state`; the state after x comes back if `keep`. T tokens at once are training or prefill, one
# token is a step of decoding. With positions (B, n), y (B, n, d_model) holds those rows only;
# that is for training and testing, and excludes `state` and `keep`.
def rows(x, positions):
    """x (B, T, d) at positions (B, n) -> (B, n, d); all of x if positions is None."""
    return x if positions is None else x.gather(1, positions.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def causal_conv3(x, weight, bias, last):
    """Each channel sees itself and its two predecessors. x (B, T, d), weight (d, 1, 3), last (B, 2, d) or None.

    Three shifted products: a depthwise nn.Conv1d takes about three times as long on a CPU. Returns y, the new last.
    """
    x = F.pad(x, (0, 0, 2, 0)) if last is None else torch.cat([last, x], dim=1)  # (B, 2 + T, d)
    w0, w1, w2 = weight.squeeze(1).unbind(-1)
    y = torch.addcmul(x[:, :-2] * w0, x[:, 1:-1], w1).addcmul(x[:, 2:], w2)
    return (y if bias is None else y + bias), x[:, -2:]


class ShortConv(nn.Module):
    """y = conv3(u) ⊙ Linear(u) + u: layer 1 of the paper's MQAR models. State: the last two inputs. [P App. A, C]"""

    def __init__(self, config):
        super().__init__()
        self.conv = nn.Conv1d(config.d_model, config.d_model, 3, groups=config.d_model)  # holds weight and bias
        self.gate = nn.Linear(config.d_model, config.d_model)

    def forward(self, u, state=None, keep=False, positions=None):
        y, state = causal_conv3(u, self.conv.weight, self.conv.bias, state)
        return rows(y * self.gate(u) + u, positions), state if keep else None


class GatedConv(nn.Module):
    """W_out (conv3(a) ⊙ silu(b)) with a, b of 2·d_model: the convolution layers of the paper's Pile models.

    Decoded from their parameter count, exact: the projections have biases, the convolution has none. [P App. C]
    """

    def __init__(self, config):
        super().__init__()
        inner = 2 * config.d_model
        self.project = nn.Linear(config.d_model, 2 * inner)
        self.conv = nn.Conv1d(inner, inner, 3, groups=inner, bias=False)
        self.out = nn.Linear(inner, config.d_model)

    def forward(self, u, state=None, keep=False, positions=None):
        a, b = self.project(u).chunk(2, dim=-1)
        a, state = causal_conv3(a, self.conv.weight, None, state)
        return self.out(rows(a * F.silu(b), positions)), state if keep else None

# %% Attention with a kernel: project, prepare, split, attend
class KernelAttention(nn.Module):
    """Based, ReBased and the rest of 01. State: `State` of 02, of constant size. [P 3, 4]

    q and k have heads·feature_dim channels, v has heads·(d_model // heads), as in the release.
    """

    def __init__(self, config, name):
        super().__init__()
        self.heads, inner = config.heads, config.heads * (config.d_model // config.heads)
        self.q = nn.Linear(config.d_model, config.heads * config.feature_dim, bias=False)
        self.k = nn.Linear(config.d_model, config.heads * config.feature_dim, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.out = nn.Linear(inner, config.d_model, bias=False)
        self.kernel = kernels.all_kernels(config.feature_dim, config.heads)[name]

    def queries_and_keys(self, x, positions):
        """Prepared and split: q (B, H, T or n, D), k (B, H, T, D)."""
        return (split_heads(y, self.heads) for y in self.kernel.prepare(self.q(rows(x, positions)), self.k(x)))

    def forward(self, x, state=None, keep=False, positions=None):
        if positions is not None and positions.shape[1] > self.kernel.num_features:
            return rows(self.forward(x)[0], positions), None  # n·T weights would cost more than P·T features
        q, k = self.queries_and_keys(x, positions)
        v = split_heads(self.v(x), self.heads)
        if positions is not None:
            o = linear_attention.quadratic_attention(q, k, v, self.kernel, positions)
        elif x.shape[1] == 1 and keep:
            o, state = linear_attention.recurrent_attention(q, k, v, self.kernel, state, return_state=True)
        elif keep:
            o, state = linear_attention.attention(q, k, v, self.kernel, state, return_state=True)
        else:
            o = linear_attention.attention(q, k, v, self.kernel, state)
        return self.out(o.transpose(1, 2).flatten(2)), state if keep else None

    def weights(self, x, positions):
        """The share of attention that positions (B, n) give to each place: (B, H, n, T), rows sum to 1."""
        q, k = self.queries_and_keys(x, positions)
        weights = linear_attention.causal_weights(q, k, self.kernel, positions)
        return weights / (weights.sum(-1, keepdim=True) + linear_attention.EPS)


def split_heads(x, heads):
    """(B, T, H·D) -> (B, H, T, D)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class SoftmaxAttention(nn.Module):
    """Softmax attention. State: all keys and values so far, (B, H, T, d_model/H) each; it grows with every token."""

    def __init__(self, config):
        super().__init__()
        self.heads, self.dropout = config.heads, config.attention_dropout
        self.q, self.k, self.v, self.out = (nn.Linear(config.d_model, config.d_model, config.bias) for _ in range(4))

    def forward(self, x, state=None, keep=False, positions=None):
        q, k, v = (split_heads(y, self.heads) for y in (self.q(rows(x, positions)), self.k(x), self.v(x)))
        if state is not None:
            k, v = torch.cat([state[0], k], dim=2), torch.cat([state[1], v], dim=2)
        mask = None
        if positions is not None:
            mask = (torch.arange(k.shape[2], device=x.device) <= positions.unsqueeze(-1)).unsqueeze(1)  # (B, 1, n, T)
        elif state is not None and x.shape[1] > 1:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=x.device).tril(k.shape[2] - q.shape[2])
        dropout = self.dropout if self.training else 0.0
        alone = mask is None and state is None
        o = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=alone)  # (B, H, T or n, d_model/H)
        return self.out(o.transpose(1, 2).flatten(2)), (k, v) if keep else None

    def weights(self, x, positions):
        """As `KernelAttention.weights`."""
        q, k = (split_heads(y, self.heads) for y in (self.q(rows(x, positions)), self.k(x)))
        seen = torch.arange(k.shape[2], device=x.device) <= positions.unsqueeze(-1)  # (B, n, T)
        return kernels.scaled_dot(q, k).masked_fill(~seen.unsqueeze(1), -math.inf).softmax(-1)


def make_mixer(name, config, layer=0):
    """The mixer of this name; layer 0 is the lowest (RWKV's channels start differently in each)."""
    if name in KERNEL_NAMES:
        return KernelAttention(config, name)
    if name == "rwkv":
        return baselines.RWKV(config, layer)
    others = {"short_conv": ShortConv, "gated_conv": GatedConv, "attention": SoftmaxAttention, "mamba": baselines.Mamba}
    return others[name](config)

# %% The block and the model
class SwiGLU(nn.Module):
    """W₃ (silu(W₁x) ⊙ W₂x), no biases. [S]"""

    def __init__(self, config):
        super().__init__()
        self.gate_and_up = nn.Linear(config.d_model, 2 * config.mlp, bias=False)
        self.down = nn.Linear(config.mlp, config.d_model, bias=False)

    def forward(self, x):
        gate, up = self.gate_and_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)), or x + norm(x) where there is no mlp.

    Mamba's block is its own: x + mixer(RMSNorm(x)) and no second line. [C src/mixers/mamba.py]
    """

    def __init__(self, name, config, layer=0):
        super().__init__()
        mamba = name == "mamba"
        norm = nn.LayerNorm if config.norm == "layer" and not mamba else nn.RMSNorm
        self.norm1, self.norm2 = norm(config.d_model, eps=1e-5), None if mamba else norm(config.d_model, eps=1e-5)
        self.mixer = make_mixer(name, config, layer)
        self.mlp = SwiGLU(config) if config.mlp and not mamba else nn.Identity()

    def forward(self, x, state=None, keep=False, positions=None):
        if positions is not None and (keep or state is not None):
            raise ValueError("positions are for whole sequences: they exclude state and keep")
        y, state = self.mixer(self.norm1(x), state, keep, positions)
        x = rows(x, positions) + y
        return (x if self.norm2 is None else x + self.mlp(self.norm2(x))), state


class States(list):
    """One state per layer; `length` tokens have gone in (learned positions need to know)."""

    length = 0


class LanguageModel(nn.Module):
    """Embedding, blocks, norm, and a head that shares the embedding's weights.

    `model(tokens, positions=None)`: tokens (B, T) int64 -> logits (B, T, V), or (B, n, V) at positions (B, n) only.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.position = nn.Embedding(config.positions, config.d_model) if config.positions else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(name, config, layer) for layer, name in enumerate(config.mixers))
        self.norm = (nn.LayerNorm if config.norm == "layer" else nn.RMSNorm)(config.d_model, eps=1e-5)
        self.apply(self._initialise)

    def _initialise(self, module):
        """"paper": N(0, 0.02), biases 0, the convolution as PyTorch makes it. "wide", for small models that must learn
        within a thousand steps: linear layers and convolution N(0, 1/fan_in), embedding N(0, 0.1), and a gate that
        starts near 1, so that the first layer is a plain convolution until the gate has learned to choose."""
        wide = self.config.init == "wide"
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.1 if wide else 0.02)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5 if wide else 0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, ShortConv) and wide:  # after its own Linear: `apply` visits children first
            nn.init.normal_(module.conv.weight, std=3**-0.5)
            nn.init.zeros_(module.conv.bias)
            nn.init.normal_(module.gate.weight, std=0.02)
            nn.init.ones_(module.gate.bias)

    def embed(self, tokens, start=0):
        """tokens (B, T) -> (B, T, d_model). Raises ValueError past the learned positions."""
        if tokens.ndim != 2 or tokens.dtype != torch.int64 or 0 in tokens.shape:
            raise ValueError(f"tokens must be int64 of shape (B, T), got {tokens.dtype} {tuple(tokens.shape)}")
        if tokens.device.type == "cpu" and not 0 <= tokens.min() <= tokens.max() < self.config.vocab_size:
            raise ValueError(f"tokens must lie in 0 and below {self.config.vocab_size}, got {tokens.min()} to {tokens.max()}")
        x, end = self.embedding(tokens), start + tokens.shape[1]
        if self.position is not None:
            if end > self.config.positions:
                raise ValueError(f"{end} tokens, but this model has {self.config.positions} learned positions; "
                                 "shorten the input or build it with positions=0")
            x = x + self.position.weight[start:end]
        return self.dropout(x)

    def forward(self, tokens, positions=None):
        return self.top(self.trunk(tokens), positions)

    def trunk(self, tokens):
        """Everything below the last layer: tokens (B, T) -> (B, T, d_model)."""
        x = self.embed(tokens)
        for block in self.blocks[:-1]:
            x, _ = block(x)
        return x

    def top(self, x, positions=None):
        """The last layer and the head on x = trunk(tokens) -> logits (B, T or n, V)."""
        x, _ = self.blocks[-1](x, positions=positions)
        return F.linear(self.norm(x), self.embedding.weight)

    def attention_weights(self, x, positions):
        """What the last layer looks at from positions (B, n), x = trunk(tokens): (B, H, n, T), rows sum to 1."""
        return self.blocks[-1].mixer.weights(self.blocks[-1].norm1(x), positions)

    def prefill(self, tokens, states=None):
        """tokens (B, T), after `states` if given -> logits (B, V) of what follows the last one, and the states."""
        new = States()
        states = States([None] * len(self.blocks)) if states is None else states
        x, new.length = self.embed(tokens, states.length), states.length + tokens.shape[1]
        for block, state in zip(self.blocks, states, strict=True):
            x, state = block(x, state, keep=True)
            new.append(state)
        return F.linear(self.norm(x[:, -1]), self.embedding.weight), new

    def step(self, tokens, states=None):
        """One token per sequence: tokens (B,) -> logits (B, V) and the next states."""
        return self.prefill(tokens.unsqueeze(1), states)


@torch.no_grad()
def generate(model, tokens, steps, temperature=0.0, top_k=None, states=None):
    """Continue tokens (B, T): yields `steps` tensors (B,), one token each as it is chosen.

    Prefill once, then steps of constant cost (softmax: growing). temperature 0 takes the likeliest token.
    Raises ValueError for a negative temperature or top_k < 1.
    """
    if temperature < 0 or (top_k is not None and top_k < 1):
        raise ValueError(f"temperature must be >= 0 and top_k >= 1, got {temperature} and {top_k}")
    logits, states = model.prefill(tokens, states)
    for i in range(steps):
        if top_k is not None:
            least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < least, -math.inf)
        chosen = logits.argmax(-1)
        if temperature > 0:
            chosen = torch.multinomial((logits / temperature).softmax(-1), 1).squeeze(1)
        yield chosen
        if i + 1 < steps:
            logits, states = model.step(chosen, states)

# %% The models of 04 and 05
def two_layers(mixer):
    """Layer names: a short convolution below the mixer; "attention", "mamba" and "rwkv" stand in both layers."""
    if mixer in ("attention", *BASELINES):
        return (mixer, mixer)
    return ("short_conv", "attention" if mixer == "conv_attention" else mixer)


def recall_config(mixer, vocab_size=256, d_model=64, heads=1):
    """The laptop experiment of 04: no learned positions, so that it can be tested at any length."""
    return ModelConfig(two_layers(mixer), vocab_size, d_model, heads, init="wide")


def mqar_config(mixer, d_model, seq_len):
    """The paper's MQAR model, exact to the parameter. [P App. A, Table 6; C]

    mixer: "attention", "conv_attention", "mamba", "rwkv" or a kernel's name. The rows of Table 6 were counted at 256
    tokens (Based, ReBased), 1,024 (attention, RWKV, Mamba but for 512 at d_model 512), 512 and 128 (conv-attention).
    """
    heads = 12 if mixer in KERNEL_NAMES else 1
    dropout = 0.0 if mixer == "mamba" else 0.1  # [C]: Mamba's block has no embedding dropout
    return ModelConfig(two_layers(mixer), 8192, d_model, heads, positions=seq_len, bias=True, dropout=dropout,
                       attention_dropout=0.1)


def pile_config(mixer):
    """The paper's Pile model, exact to the parameter: "attention", or a kernel's name below gated convolutions. [P App. C]"""
    softmax = mixer == "attention"
    mixers = ("attention",) * 12 if softmax else ("gated_conv", mixer) * 9
    return ModelConfig(mixers, 50280, 768, heads=12, norm="rms", mlp=3072 if softmax else 1536)


def count_parameters(config):
    """Parameters of the model, without making it (the meta device holds shapes only)."""
    with torch.device("meta"):
        return sum(p.numel() for p in LanguageModel(config).parameters())

# %% Claims
EXAMPLES = ("conv_attention", "attention", "based", "rebased", "elu", "elementwise")


def small_model(mixer, mlp=0, seed=0):
    """A random float64 model in evaluation mode."""
    torch.manual_seed(seed)
    config = ModelConfig(two_layers(mixer), 20, 12, heads=3, feature_dim=4, mlp=mlp, init="wide")
    return LanguageModel(config).double().eval()


@torch.no_grad()
def check_decoding_equals_forward():
    """Token by token, or prefill and then steps, gives the logits of the whole sequence at once."""
    tokens = torch.randint(20, (2, 25), generator=torch.Generator().manual_seed(0))
    for mixer in EXAMPLES:
        model, states = small_model(mixer, mlp=8), None
        whole = model(tokens)
        for t in range(25):
            logits, states = model.step(tokens[:, t], states)
            assert torch.allclose(logits, whole[:, t], rtol=1e-8, atol=1e-10), f"{mixer}: step {t} differs"
        _, states = model.prefill(tokens[:, :9])
        logits, _ = model.prefill(tokens[:, 9:], states)
        assert torch.allclose(logits, whole[:, -1], rtol=1e-8, atol=1e-10), f"{mixer}: prefill in two parts differs"


@torch.no_grad()
def check_rows_are_rows():
    """Logits at a few positions are those rows of all logits; the weights of a row sum to 1."""
    tokens = torch.randint(20, (2, 25), generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[3, 24, 0], [7, 8, 20]])
    for mixer in EXAMPLES:
        model = small_model(mixer)
        assert torch.allclose(model(tokens, positions), rows(model(tokens), positions)), mixer
        sums = model.attention_weights(model.trunk(tokens), positions).sum(-1)
        assert torch.allclose(sums, torch.ones_like(sums)), mixer


def check_the_papers_parameter_counts():
    """Table 6 of [P] and the three models of its Pile experiment."""
    published = {
        ("based", 256): (577_984, 1_179_520, 2_459_392, 5_307_904),
        ("attention", 1024): (623_744, 1_313_024, 2_888_192, 6_824_960),
        ("rwkv", 1024): (623_872, 1_313_280, 2_888_704, 6_825_984),
        ("mamba", 1024): (655_360, 1_413_120, 3_235_840),
    }
    for (mixer, seq_len), expected in published.items():
        counts = tuple(count_parameters(mqar_config(mixer, d, seq_len)) for d in (64, 128, 256, 512))
        assert counts[: len(expected)] == expected, f"{mixer}: {counts}"
    assert count_parameters(mqar_config("rebased", 64, 256)) == published["based", 256][0] + 768
    pile = [count_parameters(pile_config(mixer)) for mixer in ("attention", "based", "rebased")]
    assert pile == [151_880_448, 147_542_016, 147_548_928], pile


CHECKS = [check_decoding_equals_forward, check_rows_are_rows, check_the_papers_parameter_counts]

# %% The table: what one more token costs
# The states are filled with random numbers instead of a prefill: what a step costs does not depend on what they hold.
def state_bytes(state):
    """Bytes of the tensors in a state."""
    return state.nbytes if isinstance(state, torch.Tensor) else sum(state_bytes(part) for part in state)


def states_after(model, context, batch):
    """States as they are after `context` tokens: of constant size, but for a softmax cache."""
    _, states = model.prefill(torch.zeros(batch, 1, dtype=torch.int64))
    for i, name in enumerate(model.config.mixers):
        if name == "attention":
            heads, size = model.config.heads, model.config.d_model // model.config.heads
            states[i] = tuple(torch.randn(2, batch, heads, context, size).unbind())
    return states


@torch.no_grad()
def decoding_cost(mixer, context, batch, steps=20):
    """(bytes of all states, median seconds of a step, of its attention alone if it is softmax) after `context` tokens."""
    torch.manual_seed(0)
    model = LanguageModel(recall_config(mixer, d_model=128, heads=2)).eval()
    states, tokens = states_after(model, context, batch), torch.zeros(batch, dtype=torch.int64)
    calls = {"step": lambda: model.step(tokens, states)}
    if mixer == "conv_attention":
        (k, v), q = states[1], torch.randn(batch, 2, 1, 64)
        calls["attention"] = lambda: F.scaled_dot_product_attention(q, k, v)
    times = cost.interleaved(calls, steps)
    return state_bytes(states), times["step"], times.get("attention")


def print_decoding(contexts, batches):
    """Bytes of state and milliseconds a step for each mixer; returns {(batch, mixer, context): (bytes, seconds, ...)}."""
    print("One more token after a context of T: size of all states, milliseconds a step. Two layers, d_model 128, 2 heads.\n")
    print(f"{'batch':6}{'mixer':24}" + "".join(f"{f'T = {T:,}':>23}" for T in contexts))
    costs = {}
    for batch in batches:
        for mixer in ("conv_attention", "based", "rebased"):
            row = costs[batch, mixer] = [decoding_cost(mixer, T, batch) for T in contexts]
            cells = "".join(f"{size / 2**20:9.2f} MB{time * 1e3:8.2f} ms" for size, time, _ in row)
            print(f"{batch:<6}{mixer:24}{cells}")
            if mixer == "conv_attention":
                print(f"{'':6}{'  its attention alone':24}" + "".join(f"{time * 1e3:20.2f} ms" for *_, time in row))
    print("The softmax cache is a value here, copied to grow at each step; in place it would cost its attention alone.\n")
    return costs


def main(argv=None):
    """The table, its reading, the checks; returns how many checks failed."""
    parser = argparse.ArgumentParser(description="03: the language model; what decoding one token costs (10 seconds)")
    parser.add_argument("--benchmark", action="store_true", help="batch 1 and 32, contexts to 65,536 (1 minute, 9 GB)")
    options = kernels.parse_arguments(parser, argv)
    contexts, batches = ((1024, 4096, 16384, 65536), (1, 32)) if options.benchmark else ((256, 1024, 4096, 16384), (1,))
    costs = print_decoding(contexts, batches)
    for batch in batches:
        softmax, rebased = costs[batch, "conv_attention"], costs[batch, "rebased"]
        print(f"From T = {contexts[0]:,} to {contexts[-1]:,} the softmax states grew {softmax[-1][0] / softmax[0][0]:.0f} times "
              f"and a step took {softmax[-1][1] / softmax[0][1]:.1f} times as long; ReBased's kept the same "
              f"{rebased[0][0] / 2**20:.2f} MB, a step took {rebased[-1][1] / rebased[0][1]:.1f} times as long (batch {batch}).")
    print()
    return kernels.run_checks(CHECKS)


if __name__ == "__main__":
    if main():
        sys.exit(1)
