"""03 · The model: short convolution, attention, and decoding from a state that does not grow

Aim: put the kernels into a language model that trains like a transformer and speaks like a recurrent network.

You will learn
  1. what the layer below the attention does: it tells each token what stands just before it;
  2. how little separates softmax, Based and ReBased as layers of one model;
  3. how the paper's models are put together, exact to the parameter;
  4. how one `forward` serves training, prompts and decoding: it takes a state and gives back the next.

Equations
  short convolution   y = conv3(u) ⊙ Linear(u) + u, causal, each channel by itself               [1, App. A; 2]
  block               x ← x + mixer(norm(x)),  then  x ← x + mlp(norm(x))
  block without mlp   x ← x + mixer(norm(x)),  then  x ← x + norm(x)                             [2, src/model.py]
  SwiGLU              mlp(x) = W₃ (silu(W₁ x) ⊙ W₂ x)                                            [3]

Letters: B batch, H heads, T time (tokens), D size of a query or key in one head, Dv size of a value in one head,
  d_model width of the model, V size of the vocabulary, n number of places that are asked for.

References
  [1] Aksenov et al., Linear Transformers with Learnable Kernel Functions are Better In-Context Models, ACL 2024,
      arXiv 2402.10644.
  [2] The code released with it: github.com/corl-team/rebased.
  [3] Shazeer, GLU Variants Improve Transformer, arXiv 2002.05202.

Run: python 03_model.py      (10 seconds)
"""

# %%
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from rebased import EPS, kernels, lesson, linear_attention  # 01_kernels.py, 02_linear_attention.py

# %% [markdown]
# ## Why a convolution below the attention
#
# In *associative recall* a text holds pairs of a key and its value. Later a key returns, and its value is asked for:
# `a 7 b 8 … a` should be continued with `7`. Attention alone cannot do that. The query `a` finds the places that look
# like it, and those hold an `a`. The value stands one place further, and all that its place says is `7`: nothing there
# speaks of `a`. So a value must first learn which key stands before it.
#
# A convolution of width 3 tells it. It adds up a token and its two predecessors, each channel with weights of its own, and
# it is *causal*: nothing comes from the future.
#
# $$\mathrm{conv3}(u)_t = w_0 \odot u_{t-2} + w_1 \odot u_{t-1} + w_2 \odot u_t + b$$
#
# These are three shifted products. PyTorch's `nn.Conv1d` computes the same, and a training step of the recall model then
# takes 9.3 ms on one core instead of 3.3. To continue a text later, one needs its last two rows: they are the *state* of
# this layer.

# %%
def causal_conv3(u, weight, bias=None, last=None):
    """u (B, T, d), weight (d, 1, 3) as nn.Conv1d has it -> y (B, T, d), and the last two rows (B, 2, d).

    last: the two rows before u, if u continues something; else zeros.
    """
    if last is None:
        last = u.new_zeros(u.shape[0], 2, u.shape[2])
    u = torch.cat([last, u], dim=1)  # (B, 2 + T, d)
    w0, w1, w2 = weight.squeeze(1).unbind(-1)  # (d,) each
    y = u[:, :-2] * w0
    y = torch.addcmul(y, u[:, 1:-1], w1)  # y + u w1, in one pass over memory
    y = torch.addcmul(y, u[:, 2:], w2)
    if bias is not None:
        y = y + bias
    return y, u[:, -2:].clone()  # a copy: a view would keep all T rows in memory

# %% [markdown]
# The smallest example, with weights set by hand. Tokens are one-hot vectors, the similarity is the square of 01, queries
# and values say which token stands at their place. Only the keys differ, from row to row of the table: they say what
# token this is (no convolution), or what token stands before it (convolution with w₁ = 1). Here `a` is asked twice.

# %%
SYMBOLS = "ab78."


def show_what_a_query_sees(text="a7b8a.a"):
    """Where the last `a` looks, and what it reads there, for three kinds of keys."""
    tokens = torch.tensor([SYMBOLS.index(symbol) for symbol in text])
    u = F.one_hot(tokens, len(SYMBOLS)).float()  # (T, 5)
    only_before = torch.tensor([0.0, 1.0, 0.0]).expand(len(SYMBOLS), 1, 3)
    before, _ = causal_conv3(u.unsqueeze(0), only_before)  # (1, T, 5)
    is_a_number = u @ torch.tensor([[0.0], [0.0], [1.0], [1.0], [0.0]])  # (T, 1): a Linear of u
    keys = {"no convolution": u, "convolution": before[0], "with a gate": before[0] * is_a_number}

    print("                " + "".join(f"{symbol:>6}" for symbol in text) + "    reads")
    for name, k in keys.items():
        weights = (k @ u[-1]).square()  # (T,)
        weights = weights / weights.sum()
        read = weights @ u  # (5,)
        words = [f"{share:.2f} of {symbol}" for symbol, share in zip(SYMBOLS, read, strict=True) if share > 0]
        print(f"{name:16}" + "".join(f"{weight:6.2f}" for weight in weights) + "    " + ", ".join(words))
    print()


if __name__ == "__main__":
    show_what_a_query_sees()

# %% [markdown]
# Without the convolution the query finds itself and its likes, and reads `a`. With it the query finds what stands after
# an `a`: the `7`, but also the `.` that followed when `a` was asked before. A sum cannot help that: it treats all tokens
# alike. The *gate* can: a second linear map of the token is multiplied to the sum, and so a token chooses whether it takes
# up what stands before it. Here numbers do and a dot does not.

# %%
class ShortConv(nn.Module):
    """y = conv3(u) ⊙ Linear(u) + u: the first layer of the paper's recall models. [1, App. A; 2]

    State: the last two inputs, (B, 2, d_model).
    """

    def __init__(self, config):
        super().__init__()
        self.conv = nn.Conv1d(config.d_model, config.d_model, 3, groups=config.d_model)  # only holds weight and bias
        self.gate = nn.Linear(config.d_model, config.d_model)

    def forward(self, u, state=None, return_state=False):
        y, state = causal_conv3(u, self.conv.weight, self.conv.bias, state)
        y = y * self.gate(u) + u
        return (y, state) if return_state else y

# %% [markdown]
# This is what we call a *mixer*: a layer that moves information between places. All mixers are called alike, with x of
# shape (B, T, d_model) and the state of what came before, and return the state after x if they are asked to.
#
# The language models of the paper have another gated convolution. Its inner width is twice that of the model, and a SiLU
# stands at the gate.

# %%
class GatedConv(nn.Module):
    """y = W_out (conv3(a) ⊙ silu(b)), where [a, b] = W_in u: the convolution of the paper's Pile models.

    Read off from their number of parameters: the projections have biases, the convolution has none. [1, App. C]
    State: the last two rows of a, (B, 2, 2·d_model).
    """

    def __init__(self, config):
        super().__init__()
        inner = 2 * config.d_model
        self.project = nn.Linear(config.d_model, 2 * inner)
        self.conv = nn.Conv1d(inner, inner, 3, groups=inner, bias=False)
        self.out = nn.Linear(inner, config.d_model)

    def forward(self, u, state=None, return_state=False):
        a, b = self.project(u).chunk(2, dim=-1)  # (B, T, 2·d_model) each
        a, state = causal_conv3(a, self.conv.weight, None, state)
        y = self.out(a * F.silu(b))
        return (y, state) if return_state else y

# %% [markdown]
# ## Attention as a mixer
#
# Project x to queries, keys and values, split them into heads, attend, join the heads, project. Kernel attention has one
# step more: `prepare` of 01 acts before the split, because what ReBased learns acts on all heads together.
#
# Sometimes a few places are enough: a loss that looks at 16 queries of 128, or a table of where they look. For those
# `weights` writes out n rows of the attention, and `at` the output at these n places only. Both kinds of attention share
# that.

# %%
def split_heads(x, heads):
    """(B, T, H·D) -> (B, H, T, D)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x):
    """(B, H, T, D) -> (B, T, H·D)."""
    return x.transpose(1, 2).flatten(2)


def rows(x, positions):
    """The rows of x (B, T, d) at positions (B, n): (B, n, d)."""
    return x.gather(1, positions.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


class Attention(nn.Module):
    """What softmax and kernel attention share: four projections, and the output at a few places only."""

    def project(self, x, positions=None):
        """q (B, H, n or T, D), k (B, H, T, D), v (B, H, T, Dv); with positions (B, n), queries of those places only."""
        q = self.q(x if positions is None else rows(x, positions))
        q, k = self.prepare(q, self.k(x))
        return split_heads(q, self.heads), split_heads(k, self.heads), split_heads(self.v(x), self.heads)

    def weights(self, x, positions):
        """The shares of attention that positions (B, n) give to all places: (B, H, n, T); rows sum to 1."""
        q, k, _ = self.project(x, positions)
        return self.normalised(q, k, positions)

    def at(self, x, positions):
        """What forward(x) has at positions (B, n), and nothing else: (B, n, d_model)."""
        q, k, v = self.project(x, positions)
        weights = F.dropout(self.normalised(q, k, positions), self.dropout, self.training)
        return self.out(join_heads(weights @ v))

    def normalised(self, q, k, positions):
        """q (B, H, n, D), k (B, H, T, D) -> (B, H, n, T); nothing is given to places after one's own."""
        seen = torch.arange(k.shape[2], device=k.device) <= positions.unsqueeze(-1)  # (B, n, T)
        return self.shares(q, k, seen.unsqueeze(1))


class KernelAttention(Attention):
    """Based, ReBased and all other kernels of 01. State: `State` of 02, of constant size. [1, sections 3 and 4]

    q and k have heads·feature_dim channels, v has heads·(d_model // heads), as in the released code [2].
    """

    dropout = 0.0

    def __init__(self, config, name):
        super().__init__()
        self.heads = config.heads
        inner = config.heads * (config.d_model // config.heads)
        self.q = nn.Linear(config.d_model, config.heads * config.feature_dim, bias=False)
        self.k = nn.Linear(config.d_model, config.heads * config.feature_dim, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.out = nn.Linear(inner, config.d_model, bias=False)
        self.kernel = kernels.KERNELS[name](config.feature_dim, config.heads)

    def prepare(self, q, k):
        return self.kernel.prepare(q, k)

    def forward(self, x, state=None, return_state=False):
        q, k, v = self.project(x)
        if x.shape[1] == 1:
            form = linear_attention.recurrent_attention  # one token: no chunk to fill
        else:
            form = linear_attention.attention
        if not return_state:
            return self.out(join_heads(form(q, k, v, self.kernel, state)))
        o, state = form(q, k, v, self.kernel, state, return_state=True)  # (B, H, T, Dv)
        return self.out(join_heads(o)), state

    def shares(self, q, k, seen):
        weights = self.kernel.scores(q, k) * seen
        return weights / (weights.sum(-1, keepdim=True) + EPS)

    def at(self, x, positions):
        if positions.shape[1] > self.kernel.num_features:
            return rows(self(x), positions)  # so many rows of weights would cost more than all outputs
        return super().at(x, positions)

# %% [markdown]
# Softmax has no features, and so no sum that could stand for the past. Its state is the past itself, all keys and values so
# far, the *cache*: it grows with every token.

# %%
class SoftmaxAttention(Attention):
    """Softmax attention. State: keys and values so far, (B, H, T, d_model/H) each."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.dropout = config.attention_dropout
        self.q = nn.Linear(config.d_model, config.d_model, config.bias)
        self.k = nn.Linear(config.d_model, config.d_model, config.bias)
        self.v = nn.Linear(config.d_model, config.d_model, config.bias)
        self.out = nn.Linear(config.d_model, config.d_model, config.bias)

    def prepare(self, q, k):
        return q, k

    def forward(self, x, state=None, return_state=False):
        q, k, v = self.project(x)
        if state is not None:
            k = torch.cat([state[0], k], dim=2)  # (B, H, past + T, D)
            v = torch.cat([state[1], v], dim=2)
        past = k.shape[2] - q.shape[2]
        seen = None
        if past and q.shape[2] > 1:  # a query sees the past and its own predecessors
            seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=x.device).tril(past)
        dropout = self.dropout if self.training else 0.0
        o = F.scaled_dot_product_attention(q, k, v, seen, dropout, is_causal=past == 0)  # (B, H, T, Dv)
        y = self.out(join_heads(o))
        return (y, (k, v)) if return_state else y

    def shares(self, q, k, seen):
        return kernels.scaled_dot(q, k).masked_fill(~seen, -math.inf).softmax(-1)

# %% [markdown]
# ## One description of a model
#
# Everything that distinguishes the models of 04 and 05 is a field here. A mixer is known by its name: those of `MIXERS`,
# and every kernel of 01, new ones included. `BLOCKS` is empty: it is the place for architectures that bring a whole block
# of their own.

# %%
MIXERS = {"short_conv": ShortConv, "gated_conv": GatedConv, "attention": SoftmaxAttention}  # name: class(config)
BLOCKS = {}  # name: class(config, layer), with the forward of `Block` below; Mamba and RWKV in experiments/


@dataclass(frozen=True)
class ModelConfig:
    """A language model. Raises ValueError for settings that cannot be built.

    mixers: one name per layer. heads and feature_dim (D) are those of the attention layers. positions: how many
    learned positions, 0 for none. norm: "layer" or "rms". mlp: inner size of the SwiGLU, 0 for none. bias: of the
    projections of softmax attention. init: "paper" or "wide", see `initialise`.
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
        known = [*MIXERS, *kernels.KERNELS, *BLOCKS]
        for name in self.mixers:
            if name not in known:
                raise ValueError(f"unknown mixer {name!r}; choose from {', '.join(known)}")
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

# %% [markdown]
# ## The block
#
# A block normalises *before* each of its two lines and adds what comes out to x. The second line is an MLP. The paper's
# recall models have none, but their second line is still there: it adds norm(x) itself. That looks like a slip, and yet the
# published parameter counts hold five LayerNorms for two layers, so it is how those models were trained.

# %%
def make_norm(config):
    norm = nn.LayerNorm if config.norm == "layer" else nn.RMSNorm
    return norm(config.d_model, eps=1e-5)


class SwiGLU(nn.Module):
    """W₃ (silu(W₁ x) ⊙ W₂ x), without biases. [3]"""

    def __init__(self, config):
        super().__init__()
        self.gate_and_up = nn.Linear(config.d_model, 2 * config.mlp, bias=False)  # W₁ and W₂
        self.down = nn.Linear(config.mlp, config.d_model, bias=False)  # W₃

    def forward(self, x):
        gate, up = self.gate_and_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)), or x + norm(x) where there is no mlp. [2, src/model.py]"""

    def __init__(self, config, name):
        super().__init__()
        self.norm1 = make_norm(config)
        self.norm2 = make_norm(config)
        self.mixer = MIXERS[name](config) if name in MIXERS else KernelAttention(config, name)
        self.mlp = SwiGLU(config) if config.mlp else nn.Identity()

    def forward(self, x, state=None, return_state=False):
        if not return_state:
            return self.second_line(x + self.mixer(self.norm1(x), state))
        y, state = self.mixer(self.norm1(x), state, return_state=True)
        return self.second_line(x + y), state

    def at(self, x, positions):
        """What forward(x) has at positions (B, n): (B, n, d_model)."""
        if not isinstance(self.mixer, Attention):
            return rows(self(x), positions)
        y = self.mixer.at(self.norm1(x), positions)
        return self.second_line(rows(x, positions) + y)

    def second_line(self, x):
        return x + self.mlp(self.norm2(x))

# %% [markdown]
# ## The model
#
# An embedding, the blocks, a norm, and a *head* that turns rows into logits. The head has no weights of its own: it
# multiplies with the embedding. `forward` gives logits everywhere. `logits_at` gives them at n places: there the last
# layer, the norm and the head are not computed at all others, and a training step of 04 takes half the time.
#
# How it starts matters. With the paper's N(0, 0.02), in the 1,200 steps of 04 one of four runs reached .667 and the
# others learned nothing. "wide" is for such small models: linear layers and the convolution N(0, 1/inputs), so that
# signals keep their size, the embedding N(0, 0.1), and the gate near 1, so that the first layer is a plain convolution
# until the gate has learned to choose.

# %%
def initialise(module, init):
    """Draw one module's parameters, "paper" [2] or "wide". For `apply`, which visits the parts before the whole."""
    wide = init == "wide"
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.1 if wide else 0.02)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5 if wide else 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, ShortConv) and wide:  # in "paper", the convolution stays as PyTorch makes it
        nn.init.normal_(module.conv.weight, std=3**-0.5)
        nn.init.zeros_(module.conv.bias)
        nn.init.normal_(module.gate.weight, std=0.02)
        nn.init.ones_(module.gate.bias)


class States(NamedTuple):
    """What a model knows after `length` tokens: one state for each layer."""

    layers: list
    length: int


class LanguageModel(nn.Module):
    """model(tokens): tokens (B, T) int64 -> logits (B, T, V). Raises ValueError for tokens that it cannot take."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.position = nn.Embedding(config.positions, config.d_model) if config.positions else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList()
        for layer, name in enumerate(config.mixers):
            self.blocks.append(BLOCKS[name](config, layer) if name in BLOCKS else Block(config, name))
        self.norm = make_norm(config)
        self.apply(lambda module: initialise(module, config.init))

    def embed(self, tokens, start=0):
        """tokens (B, T), the first of them at place `start` -> (B, T, d_model)."""
        check_tokens(tokens, self.config.vocab_size)
        x = self.embedding(tokens)
        if self.position is not None:
            end = start + tokens.shape[1]
            if end > self.config.positions:
                raise ValueError(
                    f"{end} tokens, but this model has {self.config.positions} learned positions; "
                    "shorten the input or build it with positions=0"
                )
            x = x + self.position.weight[start:end]
        return self.dropout(x)

    def head(self, x):
        """x (..., d_model) -> logits (..., V)."""
        return F.linear(self.norm(x), self.embedding.weight)

    def forward(self, tokens):
        return self.head(self.blocks[-1](self.trunk(tokens)))

    def trunk(self, tokens):
        """Everything below the last layer: tokens (B, T) -> (B, T, d_model)."""
        x = self.embed(tokens)
        for block in self.blocks[:-1]:
            x = block(x)
        return x

    def logits_at(self, tokens, positions, return_weights=False):
        """Logits at positions (B, n) int64 only: (B, n, V).

        With return_weights also the shares of attention that the last layer gives from there, (B, H, n, T).
        """
        check_positions(positions, tokens)
        x = self.trunk(tokens)
        last = self.blocks[-1]
        y = last.at(x, positions) if hasattr(last, "at") else rows(last(x), positions)
        if not return_weights:
            return self.head(y)
        return self.head(y), last.mixer.weights(last.norm1(x), positions)

    def prefill(self, tokens, states=None):
        """tokens (B, T), which continue `states` -> logits (B, V) of what follows the last one, and the States."""
        if states is None:
            states = States([None] * len(self.blocks), 0)
        x = self.embed(tokens, states.length)
        layers = []
        for block, state in zip(self.blocks, states.layers, strict=True):
            x, state = block(x, state, return_state=True)
            layers.append(state)
        return self.head(x[:, -1]), States(layers, states.length + tokens.shape[1])

    def step(self, tokens, states=None):
        """One token for each sequence: tokens (B,) -> logits (B, V) and the next States."""
        return self.prefill(tokens.unsqueeze(1), states)


def check_tokens(tokens, vocab_size):
    """Raise ValueError for what are no tokens (on a GPU their size is not read: that would make it wait)."""
    if tokens.ndim != 2 or tokens.dtype != torch.int64 or 0 in tokens.shape:
        raise ValueError(f"tokens must be int64 of shape (B, T), got {tokens.dtype} {tuple(tokens.shape)}")
    if tokens.device.type == "cpu" and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        raise ValueError(f"tokens must lie in 0 and below {vocab_size}, got {tokens.min()} to {tokens.max()}")


def check_positions(positions, tokens):
    """Raise ValueError unless positions are (B, n) places of tokens (B, T)."""
    if positions.dtype != torch.int64 or positions.ndim != 2 or len(positions) != len(tokens):
        raise ValueError(f"positions must be int64 of shape (B, n), got {positions.dtype} {tuple(positions.shape)}")
    T = tokens.shape[1]
    if positions.device.type == "cpu" and positions.numel() and not 0 <= positions.min() <= positions.max() < T:
        raise ValueError(f"positions must lie in 0 and below {T}, got {positions.min()} to {positions.max()}")

# %% [markdown]
# ## Tokens out of a state
#
# `prefill` reads a prompt and keeps one state for each layer. `step` is the same with a single token. So the same
# `forward` trains on all places at once, reads a prompt at once or in parts, and speaks. Every way must give the logits of
# the whole.

# %%
def small_model(mixer, mlp=0, seed=0):
    """A random model in float64, in evaluation mode."""
    torch.manual_seed(seed)
    config = ModelConfig(two_layers(mixer), 20, 12, heads=3, feature_dim=4, mlp=mlp, init="wide")
    return LanguageModel(config).double().eval()


def two_layers(mixer):
    """Names of the two layers of a recall model: a short convolution below the mixer that is compared.

    "attention" and architectures with a block of their own stand in both layers, "conv_attention" is softmax above a
    short convolution. [1, section 5.1]
    """
    if mixer == "attention" or mixer in BLOCKS:
        return (mixer, mixer)
    return ("short_conv", "attention" if mixer == "conv_attention" else mixer)


@torch.no_grad()
def check_decoding_equals_forward():
    """Token by token, or a prompt in two parts: the logits of the whole sequence."""
    tokens = torch.randint(20, (2, 25), generator=torch.Generator().manual_seed(0))
    for mixer in ("conv_attention", "attention", "based", "rebased", "elu"):
        model = small_model(mixer, mlp=8)
        whole = model(tokens)
        states = None
        for t in range(25):
            logits, states = model.step(tokens[:, t], states)
            assert torch.allclose(logits, whole[:, t], rtol=1e-8, atol=1e-10), f"{mixer}: step {t} differs"
        _, states = model.prefill(tokens[:, :9])
        logits, _ = model.prefill(tokens[:, 9:], states)
        assert torch.allclose(logits, whole[:, -1], rtol=1e-8, atol=1e-10), f"{mixer}: two parts differ from one"


@torch.no_grad()
def check_a_few_places_are_rows_of_all():
    """logits_at gives rows of forward; the weights of a row sum to 1."""
    tokens = torch.randint(20, (2, 25), generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[3, 24, 0], [7, 8, 20]])
    for mixer in ("conv_attention", "attention", "based", "rebased", "elu"):
        model = small_model(mixer)
        logits, weights = model.logits_at(tokens, positions, return_weights=True)
        assert torch.allclose(logits, rows(model(tokens), positions)), mixer
        assert torch.allclose(weights.sum(-1), torch.ones_like(weights[..., 0])), mixer


if __name__ == "__main__":
    lesson.check(check_decoding_equals_forward)
    lesson.check(check_a_few_places_are_rows_of_all)

# %% [markdown]
# Logits become a token in one of two ways. *Greedy* takes the likeliest. *Sampling* draws one: a temperature below 1 makes
# the likely likelier, and top-k lets only the k likeliest take part.

# %%
def token_probabilities(logits, temperature=1.0, top_k=None):
    """softmax(logits / temperature), of the top_k largest only if that is given: (B, V) -> (B, V)."""
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        largest, places = logits.topk(top_k)  # (B, k)
        logits = torch.full_like(logits, -math.inf).scatter(-1, places, largest)
    return logits.softmax(-1)


@torch.no_grad()
def generate(model, tokens, steps, temperature=0.0, top_k=None, states=None):
    """Continue tokens (B, T): yields `steps` tensors (B,), one token for each sequence, as they are chosen.

    Temperature 0 is greedy. Raises ValueError for a negative temperature or top_k < 1.
    """
    if temperature < 0 or (top_k is not None and top_k < 1):
        raise ValueError(f"temperature must be >= 0 and top_k >= 1, got {temperature} and {top_k}")
    logits, states = model.prefill(tokens, states)
    for i in range(steps):
        if i > 0:
            logits, states = model.step(chosen, states)
        if temperature == 0:
            chosen = logits.argmax(-1)  # (B,)
        else:
            chosen = torch.multinomial(token_probabilities(logits, temperature, top_k), 1).squeeze(1)
        yield chosen

# %% [markdown]
# What does one more token cost? The states are filled with random numbers here instead of by a long prefill: the cost of a
# step does not depend on what they hold. (The cache is a value, copied to grow at each step. `experiments/decoding.py` also
# times its attention alone, which is what a cache that grows in place would cost, at batch 32 and up to 65,536 tokens.)

# %%
def state_bytes(state):
    """Bytes of all tensors in a state."""
    if isinstance(state, torch.Tensor):
        return state.nbytes
    return sum(state_bytes(part) for part in state)


def states_after(model, context, batch):
    """States as they are after `context` tokens: of constant size, but for a softmax cache."""
    _, states = model.prefill(torch.zeros(batch, 1, dtype=torch.int64))
    layers = []
    for name, state in zip(model.config.mixers, states.layers, strict=True):
        if name == "attention":
            k, v = state
            state = (torch.randn(*k.shape[:2], context, k.shape[3]), torch.randn(*v.shape[:2], context, v.shape[3]))
        layers.append(state)
    return States(layers, context)


@torch.no_grad()
def show_what_a_token_costs(contexts=(256, 1024, 4096, 16384)):
    """Kilobytes of all states and milliseconds of a step, for three models that differ in one layer."""
    print("two layers, d_model 128, 2 heads, one sequence; after a context of T tokens:\n")
    print(f"{'':16}" + "".join(f"{f'T = {T:,}':>22}" for T in contexts))
    for mixer in ("conv_attention", "based", "rebased"):
        torch.manual_seed(0)
        model = LanguageModel(recall_config(mixer, d_model=128, heads=2)).eval()
        cells = ""
        for T in contexts:
            states = states_after(model, T, batch=1)
            token = torch.zeros(1, dtype=torch.int64)
            times = lesson.median_seconds({"step": lambda s=states: model.step(token, s)}, repeats=21)
            cells += f"{state_bytes(states.layers) / 1024:10,.0f} KB{times['step'] * 1e3:6.2f} ms"
        print(f"{mixer:16}{cells}")
    print()

# %% [markdown]
# ## The models of 04 and 05, and the paper's
#
# `recall_config` is the small model of 04; it has no positions, so that it can be tested at any length. The other two are
# the paper's. Nobody published their code whole, but the paper prints how many parameters they have, and a sum of that
# many digits leaves little room to be wrong.

# %%
def recall_config(mixer, vocab_size=256, d_model=64, heads=1):
    """The laptop experiment of 04."""
    return ModelConfig(two_layers(mixer), vocab_size, d_model, heads, init="wide")


def mqar_config(mixer, d_model, seq_len):
    """The paper's recall model: "attention", "conv_attention", a kernel, or a name of BLOCKS. [1, App. A; 2]"""
    return ModelConfig(
        two_layers(mixer),
        vocab_size=8192,
        d_model=d_model,
        heads=12 if mixer in kernels.KERNELS else 1,
        positions=seq_len,
        bias=True,
        dropout=0.0 if mixer == "mamba" else 0.1,  # of the embedding; the released Mamba has none [2]
        attention_dropout=0.1,
    )


def pile_config(mixer):
    """The paper's language model: "attention", or a kernel above gated convolutions. [1, App. C]"""
    softmax = mixer == "attention"
    return ModelConfig(
        mixers=("attention",) * 12 if softmax else ("gated_conv", mixer) * 9,
        vocab_size=50280,
        d_model=768,
        heads=12,
        norm="rms",
        mlp=3072 if softmax else 1536,
    )


def count_parameters(config):
    """Parameters of the model, without making it: the meta device holds shapes only."""
    with torch.device("meta"):
        return sum(p.numel() for p in LanguageModel(config).parameters())


PUBLISHED = {  # [1, Table 6]: (mixer, d_model, positions that were counted): parameters
    ("based", 64, 256): 577_984,
    ("based", 128, 256): 1_179_520,
    ("based", 256, 256): 2_459_392,
    ("based", 512, 256): 5_307_904,
    ("rebased", 64, 256): 578_752,
    ("rebased", 128, 256): 1_180_288,
    ("rebased", 256, 256): 2_460_160,
    ("rebased", 512, 256): 5_308_672,
    ("attention", 64, 1024): 623_744,
    ("attention", 128, 1024): 1_313_024,
    ("attention", 256, 1024): 2_888_192,
    ("attention", 512, 1024): 6_824_960,
    ("conv_attention", 64, 512): 578_752,
    ("conv_attention", 128, 128): 1_149_312,
    ("conv_attention", 256, 128): 2_462_464,
    ("conv_attention", 512, 128): 5_580_288,
}
PUBLISHED_PILE = {"attention": 151_880_448, "based": 147_542_016, "rebased": 147_548_928}  # [1, Table 2]


def check_the_papers_parameter_counts():
    """Table 6 and the three models of the Pile, to the parameter."""
    print(f"{'model':34}{'paper':>13}{'ours':>13}")
    for (mixer, d_model, seq_len), published in PUBLISHED.items():
        ours = count_parameters(mqar_config(mixer, d_model, seq_len))
        print(f"{f'recall, {mixer}, d_model {d_model}':34}{published:13,}{ours:13,}")
        assert ours == published
    for mixer, published in PUBLISHED_PILE.items():
        ours = count_parameters(pile_config(mixer))
        print(f"{f'Pile, {mixer}':34}{published:13,}{ours:13,}")
        assert ours == published


if __name__ == "__main__":
    show_what_a_token_costs()
    lesson.check(check_the_papers_parameter_counts)
    lesson.finish()
