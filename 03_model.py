"""03 · The model: short convolution, attention, and decoding from a state that does not grow

Aim: put the kernels into a language model that trains like a transformer and speaks like a
recurrent network.

You will learn
  1. what the layer below the attention does: it tells each token what stands just before it;
  2. how little separates softmax, Based and ReBased as layers of one model;
  3. how the paper's models are put together, and how its parameter counts tell us;
  4. how one `forward` serves training, prompts and decoding: it takes a state and gives the next.

Equations
  short convolution   y = conv3(u) ⊙ Linear(u) + u                                [1, App. A; 2]
  block               x ← x + mixer(norm(x)),  then  x ← x + mlp(norm(x))
  block without mlp   x ← x + mixer(norm(x)),  then  x ← x + norm(x)              [2, src/model.py]
  SwiGLU              mlp(x) = W₃ (silu(W₁ x) ⊙ W₂ x)                             [3]

Letters
  B batch, H heads, T time (tokens), D size of a query or key in one head, Dv of a value, d_model
  width of the model, V size of the vocabulary; x and u: what a layer is given, (B, T, d_model);
  conv3 a causal convolution over three places; ⊙ the product entry by entry; W a matrix;
  silu(a) = a · sigmoid(a). A mixer is a layer that moves information between places.

References
  [1] Aksenov et al., Linear Transformers with Learnable Kernel Functions are Better In-Context
      Models, ACL 2024, arXiv 2402.10644.
  [2] The code released with it: github.com/corl-team/rebased.
  [3] Shazeer, GLU Variants Improve Transformer, arXiv 2002.05202.

Run: python 03_model.py      (10 seconds)
"""

# %%
import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

# kernels: 01_kernels.py; linear_attention: 02_linear_attention.py
from rebased import few_places, kernels, lesson, linear_attention
from rebased.autograd import detached
from rebased.checks import check_length, check_model_config, check_tokens
from rebased.few_places import rows

# %% [markdown]
# ## Why a convolution below the attention
#
# In *associative recall* a text holds pairs of a letter and a number. Later a letter returns, and
# its number is asked for: `a 7 b 8 … a` should go on with `7`. (04 calls them keys and values, as
# the paper does. Here these words belong to attention.)
#
# A layer of attention alone cannot do that. The query of `a` finds the places that look like it,
# and those hold an `a`. The number stands one place further, and all that its place says is `7`:
# nothing there speaks of `a`. So the place of the number needs a key vector that tells which letter
# stands before it.
#
# A convolution of width 3 can make one: at every place it adds up the token and its two
# predecessors, each channel with weights of its own. It is *causal*: nothing comes from the future.
#
# $$\mathrm{conv3}(u)_t = w_0 \odot u_{t-2} + w_1 \odot u_{t-1} + w_2 \odot u_t + b$$
#
# These are three shifted products. To go on after a text, one needs its last two rows: they are the
# *state* of this layer.

# %%
def causal_conv3(u, weight, bias=None, last=None):
    """u (B, T, d), weight (d, 1, 3) as in nn.Conv1d -> y (B, T, d) and the last two rows (B, 2, d).

    last: the two rows before u, if u continues something; zeros if not.
    """
    if last is None:
        last = u.new_zeros(u.shape[0], 2, u.shape[2])
    u = torch.cat([last, u], dim=1)  # (B, 2 + T, d)
    w0, w1, w2 = weight.squeeze(1).unbind(-1)  # (d,) each
    y = u[:, :-2] * w0
    y = torch.addcmul(y, u[:, 1:-1], w1)  # y + u w1 in one pass over memory
    y = torch.addcmul(y, u[:, 2:], w2)
    if bias is not None:
        y = y + bias
    return y, u[:, -2:].clone()  # a copy: a view would keep all T rows in memory

# %% [markdown]
# The smallest example has weights set by hand. Tokens are one-hot vectors, and the similarity is
# the square of 01. The query vector says which token stands at its place, and so does each value
# vector. Only the key vectors differ from row to row of the table: they say which token stands here
# (no convolution), or which one stands before it (convolution with w₁ = 1 and w₀ = w₂ = 0). A
# trained layer does both at once, in different channels.
#
# The text stands above the columns. In it `a` is asked for twice, and each row shows how the last
# `a` shares out its attention. "Reads" adds up the shares by what stands there.

# %%
SYMBOLS = "ab78."


def show_what_a_query_sees(text="a7b8a.a"):
    """Where the last token looks, and what it reads there, for three kinds of key vectors."""
    tokens = torch.tensor([SYMBOLS.index(symbol) for symbol in text])
    u = F.one_hot(tokens, len(SYMBOLS)).float()  # (T, 5)
    only_before = torch.tensor([0.0, 1.0, 0.0]).expand(len(SYMBOLS), 1, 3)  # w₁ = 1 everywhere
    before, _ = causal_conv3(u.unsqueeze(0), only_before)  # (1, T, 5)
    is_number = u @ torch.tensor([[0.0], [0.0], [1.0], [1.0], [0.0]])  # (T, 1): a linear map of u
    key_vectors = {  # (T, 5) each
        "no convolution": u,
        "convolution": before[0],
        "with a gate": before[0] * is_number,
    }

    print(f"{'':16}" + "".join(f"{symbol:>6}" for symbol in text) + "    reads")
    for name, k in key_vectors.items():
        weights = (k @ u[-1]).square()  # (T,)
        weights = weights / weights.sum()
        parts = []
        for symbol, share in zip(SYMBOLS, weights @ u, strict=True):
            if share > 0:
                parts.append(f"{share:.2f} of {symbol}")
        cells = "".join(f"{weight:6.2f}" for weight in weights)
        print(f"{name:16}{cells}    {', '.join(parts)}")
    print()


if __name__ == "__main__":
    show_what_a_query_sees()

# %% [markdown]
# Without the convolution the query finds itself and its likes, and reads `a`. With it, it finds
# what stands after an `a`: the `7`, but also the `.` that followed when `a` was asked for before. A
# sum cannot help that, because it treats all tokens alike. A *gate* can: the sum is multiplied by a
# linear map of the token itself. So a token decides whether it takes up what stands before it; here
# a number does and a dot does not. (The + u of the layer is left out here.)

# %%
class ShortConv(nn.Module):
    """y = conv3(u) ⊙ Linear(u) + u: layer 1 of the paper's recall models. [1, App. A; 2]

    State: the last two inputs, (B, 2, d_model).
    """

    def __init__(self, config):
        super().__init__()
        d_model = config.d_model
        self.conv = nn.Conv1d(d_model, d_model, 3, groups=d_model)  # only holds weight and bias
        self.gate = nn.Linear(d_model, d_model)

    def forward(self, u, state=None, return_state=False):
        y, state = causal_conv3(u, self.conv.weight, self.conv.bias, state)
        y = y * self.gate(u) + u
        return (y, state) if return_state else y

# %% [markdown]
# Such a layer, which moves information between places, is called a *mixer*. All mixers are called
# alike: x is (B, T, d_model), `state` is what came before it, and with `return_state` the state
# after x comes back beside y.
#
# The paper's language models have another gated convolution, twice as wide as the model and with a
# SiLU at the gate.

# %%
class GatedConv(nn.Module):
    """y = W_out (conv3(a) ⊙ silu(b)), [a, b] = W_in u: in the paper's Pile models. [1, App. C]

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
# Project x to queries, keys and values, split them into heads, attend, join the heads, project
# again: that much is the same for softmax and for kernels.
#
# Softmax has no features, and so no sum that could stand for the past. Its state is the past
# itself: all keys and values so far. This *cache* grows with every token.

# %%
def split_heads(x, heads):
    """(B, T, H·D) -> (B, H, T, D)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x):
    """(B, H, T, D) -> (B, T, H·D)."""
    return x.transpose(1, 2).flatten(2)


class SoftmaxAttention(nn.Module):
    """Softmax attention; queries and keys have size Dv = d_model/H, as the values have.

    State: keys and values so far, (B, H, T, Dv) each.
    """

    weights = few_places.softmax_weights  # this and `at`: see the last section
    at = few_places.softmax_at

    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.dropout = config.attention_dropout
        self.q = nn.Linear(config.d_model, config.d_model, config.bias)
        self.k = nn.Linear(config.d_model, config.d_model, config.bias)
        self.v = nn.Linear(config.d_model, config.d_model, config.bias)
        self.out = nn.Linear(config.d_model, config.d_model, config.bias)

    def forward(self, x, state=None, return_state=False):
        q = split_heads(self.q(x), self.heads)  # (B, H, T, Dv)
        k = split_heads(self.k(x), self.heads)
        v = split_heads(self.v(x), self.heads)
        if state is not None:
            k = torch.cat([state[0], k], dim=2)  # (B, H, past + T, Dv)
            v = torch.cat([state[1], v], dim=2)
        # Each new token sees all of the past, and the new ones up to itself. Without a past,
        # is_causal says that. A single new token sees everything: no mask.
        T = x.shape[1]
        mask = None
        if state is not None and T > 1:
            past = k.shape[2] - T
            mask = torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past)
        dropout = self.dropout if self.training else 0.0
        o = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=state is None)
        y = self.out(join_heads(o))
        return (y, (k, v)) if return_state else y

# %% [markdown]
# Kernel attention has one step more: `prepare` of 01 comes before the split into heads, because
# what ReBased learns acts on all heads together. Then `attention` of 02 does the work. Its state is
# that of 02, two sums whose size does not depend on T.

# %%
class KernelAttention(nn.Module):
    """Based, ReBased and every other kernel of 01. [1, sections 3 and 4]

    q and k have H·feature_dim channels, v has H·(d_model // H), as in the released code [2].
    State: `State` of 02, S (B, H, P, Dv) and z (B, H, P) for P features.
    """

    weights = few_places.kernel_weights  # this and `at`: see the last section
    at = few_places.kernel_at

    def __init__(self, config, name):
        super().__init__()
        self.heads = config.heads
        inner = config.heads * (config.d_model // config.heads)  # 12 heads do not divide 64: 60
        self.q = nn.Linear(config.d_model, config.heads * config.feature_dim, bias=False)
        self.k = nn.Linear(config.d_model, config.heads * config.feature_dim, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.out = nn.Linear(inner, config.d_model, bias=False)
        self.kernel = kernels.KERNELS[name](config.feature_dim, config.heads)

    def forward(self, x, state=None, return_state=False):
        q, k = self.kernel.prepare(self.q(x), self.k(x))  # (B, T, H·D)
        q = split_heads(q, self.heads)  # (B, H, T, D)
        k = split_heads(k, self.heads)
        v = split_heads(self.v(x), self.heads)  # (B, H, T, Dv)
        form = linear_attention.attention
        if x.shape[1] == 1:
            form = linear_attention.recurrent_attention  # one token has no chunk to fill
        if not return_state:
            return self.out(join_heads(form(q, k, v, self.kernel, state)))
        o, state = form(q, k, v, self.kernel, state, return_state=True)  # (B, H, T, Dv)
        return self.out(join_heads(o)), state

# %% [markdown]
# ## One description of a model
#
# Everything that distinguishes the models of 04 and 05 is a field of `ModelConfig`. A mixer is
# known by its name: one of `MIXERS`, or any kernel of 01, new ones included. `BLOCKS` is empty: it
# is the place for architectures that bring a whole block of their own. Mamba and RWKV do: their
# blocks stand in `rebased/`, and `experiments/` enters them here.

# %%
MIXERS = {"short_conv": ShortConv, "gated_conv": GatedConv, "attention": SoftmaxAttention}
BLOCKS = {}  # name: class(config, layer); its forward is called as that of `Block` below


@dataclass(frozen=True)
class ModelConfig:
    """A language model. Raises ValueError for settings that cannot be built.

    mixers: one name per layer, from below. heads and feature_dim (D): of the attention layers.
    positions: how many learned positions, 0 for none. norm: "layer" or "rms". mlp: inner size of
    the SwiGLU, 0 for none. bias: in the projections of softmax. init: "paper" or "wide".
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
        check_model_config(self, known=[*MIXERS, *kernels.KERNELS, *BLOCKS])

# %% [markdown]
# ## The block
#
# A block has two lines. Each normalises x, computes something, and adds it to x. In the first it is
# the mixer, in the second an MLP that acts on each place alone. The paper's recall models have no
# MLP, but the line is still there: it adds norm(x) itself. Their parameter counts show the norm,
# the released code [2] shows the sum. The small model of 04 has this line too.

# %%
class SwiGLU(nn.Module):
    """W₃ (silu(W₁ x) ⊙ W₂ x), without biases. [3]"""

    def __init__(self, config):
        super().__init__()
        self.gate_and_up = nn.Linear(config.d_model, 2 * config.mlp, bias=False)  # W₁ and W₂
        self.down = nn.Linear(config.mlp, config.d_model, bias=False)  # W₃

    def forward(self, x):
        gate, up = self.gate_and_up(x).chunk(2, dim=-1)  # (B, T, mlp) each
        return self.down(F.silu(gate) * up)


def make_norm(config):
    """LayerNorm or RMSNorm over d_model channels."""
    norm = nn.LayerNorm if config.norm == "layer" else nn.RMSNorm
    return norm(config.d_model, eps=1e-5)


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)) or, without an mlp, x + norm(x). [2, src/model.py]

    State: that of the mixer.
    """

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

    def second_line(self, x):
        return x + self.mlp(self.norm2(x))

# %% [markdown]
# ## The model
#
# An embedding, the blocks, a last norm, and a *head* that turns each row into logits. The head has
# no weights of its own, it multiplies with the embedding. `forward` gives logits at all places.
# `prefill` reads a prompt, keeps the state of each layer, and gives the logits of the next token
# only. `step` is the same with one token.

# %%
class States(NamedTuple):
    """What a model knows after `length` tokens: the state of each layer."""

    layers: list
    length: int

    def __deepcopy__(self, memo):
        return detached(self)  # the numbers; a graph cannot be copied


class LanguageModel(nn.Module):
    """model(tokens): tokens (B, T) int64 -> logits (B, T, V).

    Raises ValueError, in all methods, for tokens outside the vocabulary, and for more tokens than
    learned positions.
    """

    logits_at = few_places.logits_at  # logits at a few places: see the last section

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.position = nn.Embedding(config.positions, config.d_model) if config.positions else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList()
        for layer, name in enumerate(config.mixers):
            block = BLOCKS[name](config, layer) if name in BLOCKS else Block(config, name)
            self.blocks.append(block)
        self.norm = make_norm(config)
        self.apply(lambda module: initialise(module, config.init))

    def forward(self, tokens):
        x = self.trunk(tokens)
        return self.head(self.blocks[-1](x))

    def trunk(self, tokens):
        """Everything below the last layer: tokens (B, T) -> (B, T, d_model)."""
        x = self.embed(tokens)
        for block in self.blocks[:-1]:
            x = block(x)
        return x

    def embed(self, tokens, start=0):
        """tokens (B, T), of which the first stands at place `start` -> (B, T, d_model)."""
        check_tokens(tokens, self.config.vocab_size)
        x = self.embedding(tokens)
        if self.position is not None:
            end = start + tokens.shape[1]
            check_length(end, self.config.positions)
            x = x + self.position.weight[start:end]
        return self.dropout(x)

    def head(self, x):
        """x (..., d_model) -> logits (..., V)."""
        return F.linear(self.norm(x), self.embedding.weight)

    def prefill(self, tokens, states=None):
        """Read tokens (B, T), after `states` -> logits (B, V) of the next token, and the States."""
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

# %% [markdown]
# How the parameters are drawn has two settings. "paper" is that of the paper, N(0, 0.02). "wide" is
# for the small models of 04: linear layers and convolution N(0, 1/inputs), so that signals keep
# their size; the embedding N(0, 0.1); and a gate near 1, so that the first layer is a plain
# convolution until the gate has learned to choose.

# %%
def initialise(module, init):
    """Draw the parameters of one module. For `apply`, which visits the parts before the whole."""
    wide = init == "wide"
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.1 if wide else 0.02)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5 if wide else 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, ShortConv) and wide:  # "paper": the convolution as PyTorch makes it
        nn.init.normal_(module.conv.weight, std=3**-0.5)
        nn.init.zeros_(module.conv.bias)
        nn.init.normal_(module.gate.weight, std=0.02)
        nn.init.ones_(module.gate.bias)

# %% [markdown]
# ## The models of 04 and 05
#
# `recall_config` is the small model of 04. It has no positions, so that it can be tested at any
# length. The other two are the paper's. Where its text leaves something open, its parameter counts
# decide: few ways of building a model come out at 147,548,928. They say, for one, which parts of
# the gated convolution have biases: the two projections do, the convolution does not.
#
# One thing stays open. The paper does not state how many positions its recall models had when they
# were counted. We took for each row the power of two that fits, so these rows have one free number.
# The counts of the Pile models have none. (The table has one width, 64; the tests have all 19.)

# %%
def two_layers(mixer):
    """The layers of a recall model: a short convolution below what is compared. [1, section 5.1]

    "attention" and architectures with a block of their own stand in both layers; softmax above a
    short convolution is "conv_attention".
    """
    if mixer == "attention" or mixer in BLOCKS:
        return (mixer, mixer)
    return ("short_conv", "attention" if mixer == "conv_attention" else mixer)


def recall_config(mixer, vocab_size=256, d_model=64, heads=1):
    """The laptop experiment of 04."""
    return ModelConfig(two_layers(mixer), vocab_size, d_model, heads, init="wide")


def mqar_config(mixer, d_model, seq_len):
    """The paper's recall model; mixer: as in `two_layers`. [1, App. A; 2]"""
    return ModelConfig(
        two_layers(mixer),
        vocab_size=8192,
        d_model=d_model,
        heads=12 if mixer in kernels.KERNELS else 1,
        positions=seq_len,
        bias=True,
        dropout=0.0 if mixer == "mamba" else 0.1,  # of the embedding; the released Mamba has none
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


PUBLISHED = {  # what: our config, the paper's count [1, Tables 2 and 6]
    "recall, based": (mqar_config("based", 64, 256), 577_984),
    "recall, rebased": (mqar_config("rebased", 64, 256), 578_752),
    "recall, attention": (mqar_config("attention", 64, 1024), 623_744),
    "recall, conv_attention": (mqar_config("conv_attention", 64, 512), 578_752),
    "Pile, attention": (pile_config("attention"), 151_880_448),
    "Pile, based": (pile_config("based"), 147_542_016),
    "Pile, rebased": (pile_config("rebased"), 147_548_928),
}


def show_counts():
    print(f"{'parameters':24}{'positions':>10}{'paper':>14}{'ours':>14}")
    for what, (config, published) in PUBLISHED.items():
        ours = count_parameters(config)
        print(f"{what:24}{config.positions:10}{published:14,}{ours:14,}")
    print()


def check_the_papers_parameter_counts():
    """Every row of the table, to the parameter."""
    for what, (config, published) in PUBLISHED.items():
        ours = count_parameters(config)
        assert ours == published, f"{what}: {ours:,}, the paper has {published:,}"


if __name__ == "__main__":
    show_counts()
    lesson.check(check_the_papers_parameter_counts)

# %% [markdown]
# ## Tokens out of a state
#
# One `forward` trains on all places at once, reads a prompt at once or in parts, and speaks. Each
# way must give the logits of the whole sequence.

# %%
EXAMPLES = ("conv_attention", "attention", "based", "rebased", "elu")
TOKENS = torch.randint(20, (2, 25), generator=torch.Generator().manual_seed(0))


def small_model(mixer, mlp=0, seed=0):
    """A random model in float64, in evaluation mode."""
    torch.manual_seed(seed)
    config = ModelConfig(two_layers(mixer), 20, 12, heads=3, feature_dim=4, mlp=mlp, init="wide")
    return LanguageModel(config).double().eval()


@torch.no_grad()
def check_decoding_equals_forward():
    """Token by token, or a prompt in two parts: the logits of the whole sequence."""
    for mixer in EXAMPLES:
        model = small_model(mixer, mlp=8)
        whole = model(TOKENS)
        states = None
        for t in range(25):
            logits, states = model.step(TOKENS[:, t], states)
            assert torch.allclose(logits, whole[:, t], rtol=1e-8, atol=1e-10), f"{mixer}: {t}"
        _, states = model.prefill(TOKENS[:, :9])
        logits, _ = model.prefill(TOKENS[:, 9:], states)
        assert torch.allclose(logits, whole[:, -1], rtol=1e-8, atol=1e-10), f"{mixer}: two parts"


if __name__ == "__main__":
    lesson.check(check_decoding_equals_forward)

# %% [markdown]
# Logits become a token in one of two ways. *Greedy* takes the likeliest. *Sampling* draws: a
# temperature below 1 makes the likely likelier, and top-k lets only the k likeliest take part. A
# temperature near 0 would leave only the likeliest token, but logits divided by so little overflow.
# So below 1e-3 we take the greedy token at once.
#
# Below, a random model goes on after a prompt of four tokens. Then it reads only three of them, and
# its state is kept. From that state and the fourth token it must go on as before; from the fourth
# token alone it need not.

# %%
def token_probabilities(logits, temperature=1.0, top_k=None):
    """softmax(logits / temperature), of the k largest only if top_k is given: (B, V) -> (B, V)."""
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        largest, tokens = logits.topk(top_k)  # (B, k) each
        logits = torch.full_like(logits, -math.inf).scatter(-1, tokens, largest)
    return logits.softmax(-1)


COLDEST = 1e-3  # temperatures below are greedy


@torch.no_grad()
def generate(model, tokens, steps, temperature=0.0, top_k=None, states=None):
    """Continue tokens (B, T): yields `steps` tensors (B,), one token each, as they are chosen.

    Temperature 0 is greedy. Raises ValueError for a negative temperature and for top_k < 1.
    """
    if math.isnan(temperature) or temperature < 0 or (top_k is not None and top_k < 1):
        raise ValueError(f"need temperature >= 0 and top_k >= 1, got {temperature} and {top_k}")
    logits, states = model.prefill(tokens, states)
    for steps_left in reversed(range(steps)):
        if temperature < COLDEST:
            chosen = logits.argmax(-1)  # (B,)
        else:
            probabilities = token_probabilities(logits, temperature, top_k)
            chosen = torch.multinomial(probabilities, 1).squeeze(1)  # (B,)
        yield chosen
        if steps_left > 0:
            logits, states = model.step(chosen, states)


def show_what_a_state_knows():
    """Eight greedy tokens: after a prompt, from a state, and without what the state knows."""
    model = small_model("rebased", seed=31)
    prompt = TOKENS[:1, :4]
    _, states = model.prefill(prompt[:, :3])
    whole = generate(model, prompt, 8)
    resumed = generate(model, prompt[:, 3:], 8, states=states)
    alone = generate(model, prompt[:, 3:], 8)
    print(f"{'prompt':32}" + "".join(f"{token:4}" for token in prompt[0].tolist()))
    spoken = {"all at once": whole, "from the state": resumed, "without the state": alone}
    for name, tokens in spoken.items():
        print(f"{name:48}" + "".join(f"{token.item():4}" for token in tokens))
    print()


if __name__ == "__main__":
    show_what_a_state_knows()

# %% [markdown]
# ## What one more token costs
#
# The three models of the table differ in one layer. With softmax the state grows from the first
# token on, and the time of a step from some thousand on. With a kernel both stay; but while the
# context is short, its step can be the dearer one. The last row divides softmax by ReBased.
#
# (Our softmax cache is a value: it is copied to grow by a token. One that grows in place would
# only cost its attention; `experiments/decoding.py` times that too, at batch 32 and up to 65,536
# tokens.)

# %%
def state_bytes(state):
    """Bytes of all tensors in a state."""
    if isinstance(state, torch.Tensor):
        return state.nbytes
    return sum(state_bytes(part) for part in state)


@torch.no_grad()
def costs_of_a_token(mixers, contexts):
    """{(mixer, T): bytes of all states} and {(mixer, T): seconds of a step} after T tokens."""
    token = torch.zeros(1, dtype=torch.int64)
    sizes = {}
    calls = {}
    for mixer in mixers:
        torch.manual_seed(0)
        model = LanguageModel(recall_config(mixer, d_model=128, heads=2)).eval()
        for T in contexts:
            _, states = model.prefill(torch.zeros(1, T, dtype=torch.int64))
            sizes[mixer, T] = state_bytes(states.layers)
            calls[mixer, T] = partial(model.step, token, states)
    return sizes, lesson.median_seconds(calls, repeats=21)  # all take turns


def show_what_a_token_costs(contexts=(256, 1024, 4096, 16384)):
    """Kilobytes of all states and milliseconds of a step; last, softmax divided by ReBased."""
    mixers = ("conv_attention", "based", "rebased")
    sizes, seconds = costs_of_a_token(mixers, contexts)
    print("two layers, d_model 128, 2 heads, one sequence\n")
    print(f"{'':16}" + "".join(f"{f'T = {T:,}':>22}" for T in contexts))
    for mixer in mixers:
        print(f"{mixer:16}", end="")
        for T in contexts:
            print(f"{sizes[mixer, T] / 1024:10,.0f} KB{seconds[mixer, T] * 1e3:6.2f} ms", end="")
        print()
    print(f"{'quotient':16}", end="")
    for T in contexts:
        size = sizes["conv_attention", T] / sizes["rebased", T]
        time = seconds["conv_attention", T] / seconds["rebased", T]
        print(f"{size:10.1f}   {time:6.1f}   ", end="")
    print("\n")


if __name__ == "__main__":
    show_what_a_token_costs()

# %% [markdown]
# ## A few places only
#
# Sometimes a few places are enough. A loss may look at 16 queries of 128 tokens, as that of 04
# does, or one wants to see where a query looks. `logits_at` gives the logits at n places: the last
# layer, the norm and the head leave out all others, and the layers below, on which these places
# depend, are computed in full.
#
# In the last layer an attention forms n rows of its T × T weights. A kernel can do that as well as
# softmax: its similarities, divided by their sum, are the weights that its state hides. They come
# back with `return_weights`, and 04 shows them. (The code is in `rebased/few_places.py`.)

# %%
@torch.no_grad()
def check_a_few_places_are_rows_of_all():
    """logits_at gives rows of forward; each row of the weights sums to 1."""
    positions = torch.tensor([[3, 24, 0], [7, 8, 20]])
    for mixer in EXAMPLES:
        model = small_model(mixer)
        logits, weights = model.logits_at(TOKENS, positions, return_weights=True)
        assert torch.allclose(logits, rows(model(TOKENS), positions)), mixer
        assert torch.allclose(weights.sum(-1), torch.ones_like(weights[..., 0])), mixer


if __name__ == "__main__":
    lesson.check(check_a_few_places_are_rows_of_all)
    lesson.finish()
