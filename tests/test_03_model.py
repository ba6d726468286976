"""03_model.py: against a slow second model, decoding, a few places, counts, sampling, errors, new kernels."""

import io
import math
from functools import partial

import pytest
import torch

from rebased import EPS, kernels
from rebased import model as m

MIXERS = ["conv_attention", "attention", *kernels.KERNELS]
LAYERS = ["short_conv", "gated_conv"]  # stand in both layers by themselves, below
TOKENS = torch.randint(20, (2, 25), generator=torch.Generator().manual_seed(0))
POSITIONS = torch.tensor([[3, 24, 0], [7, 8, 20]])


def small(mixer, mlp=0, **options):
    """A random model in float64; both layers are convolutions if `mixer` is one."""
    if mixer not in LAYERS and not options:
        return m.small_model(mixer, mlp)
    torch.manual_seed(0)
    layers = (mixer, mixer) if mixer in LAYERS else m.two_layers(mixer)
    settings = dict(heads=3, feature_dim=4, mlp=mlp, init="wide") | options
    return m.LanguageModel(m.ModelConfig(layers, 20, 12, **settings)).double().eval()


@pytest.mark.parametrize(
    "check",
    [m.check_decoding_equals_forward, m.check_a_few_places_are_rows_of_all, m.check_the_papers_parameter_counts],
    ids=lambda check: check.__name__,
)
def test_claims_of_the_file(check):
    check()


# A slow second model
# The same models once more, from the formulas and with nothing of the file: one sequence, one place, one head at once.
# w: the parameters by their names; x: a list of T vectors.
def slow_norm(x, w, name, rms):
    weight = w[name + ".weight"]
    if rms:
        return [v / (v.square().mean() + 1e-5).sqrt() * weight for v in x]
    bias = w[name + ".bias"]
    return [(v - v.mean()) / ((v - v.mean()).square().mean() + 1e-5).sqrt() * weight + bias for v in x]


def silu(v):
    return v / (1 + torch.exp(-v))


def slow_conv3(u, weight, bias):
    """Each channel: weight (d, 1, 3) of places t−2, t−1, t."""
    zeros = torch.zeros_like(u[0])
    padded = [zeros, zeros, *u]
    return [sum(weight[:, 0, i] * padded[t + i] for i in range(3)) + bias for t in range(len(u))]


def slow_short_conv(u, w, config):
    y = slow_conv3(u, w["conv.weight"], w["conv.bias"])
    return [y[t] * (w["gate.weight"] @ u[t] + w["gate.bias"]) + u[t] for t in range(len(u))]


def slow_gated_conv(u, w, config):
    inner = 2 * config.d_model
    both = [w["project.weight"] @ v + w["project.bias"] for v in u]
    a = slow_conv3([v[:inner] for v in both], w["conv.weight"], 0)
    return [w["out.weight"] @ (a[t] * silu(both[t][inner:])) + w["out.bias"] for t in range(len(u))]


def slow_attention(u, w, config, similarity):
    """similarity(q, k) of all channels, for one head: a slice of them."""
    q, k, v = ([w[name + ".weight"] @ x + w.get(name + ".bias", 0) for x in u] for name in ("q", "k", "v"))
    outputs = []
    for t in range(len(u)):
        heads = []
        for h in range(config.heads):
            of_values = slice(h * (len(v[0]) // config.heads), (h + 1) * (len(v[0]) // config.heads))
            weights = [similarity(q[t], k[j], h, w) for j in range(t + 1)]
            heads.append(sum(weights[j] * v[j][of_values] for j in range(t + 1)) / (sum(weights) + EPS))
        outputs.append(w["out.weight"] @ torch.cat(heads) + w.get("out.bias", 0))
    return outputs


def softmax_similarity(q, k, h, w, size):
    head = slice(h * size, (h + 1) * size)
    return torch.exp(q[head] @ k[head] / math.sqrt(size))


def rebased_similarity(q, k, h, w, size):
    """(γ norm(q) + β)·(the same of k), squared; the norm is over all heads together."""
    head = slice(h * size, (h + 1) * size)
    places = []
    for x, side in ((q, "q"), (k, "k")):
        normed = (x - x.mean()) / ((x - x.mean()).square().mean() + 1e-5).sqrt()
        places.append((w[f"kernel.gamma_{side}"] * normed + w[f"kernel.beta_{side}"])[head])
    return (places[0] @ places[1]) ** 2 / size


SLOW_MIXERS = {
    "short_conv": lambda u, w, c: slow_short_conv(u, w, c),
    "gated_conv": lambda u, w, c: slow_gated_conv(u, w, c),
    "attention": lambda u, w, c: slow_attention(u, w, c, partial(softmax_similarity, size=c.d_model // c.heads)),
    "rebased": lambda u, w, c: slow_attention(u, w, c, partial(rebased_similarity, size=c.feature_dim)),
}


def slow_model(w, config, tokens):
    """One sequence: tokens, a list of T numbers -> logits (T, V)."""
    rms = config.norm == "rms"
    x = [w["embedding.weight"][token] for token in tokens]
    if config.positions:
        x = [x[t] + w["position.weight"][t] for t in range(len(x))]
    for i, name in enumerate(config.mixers):
        mine = {key.removeprefix(f"blocks.{i}."): value for key, value in w.items() if key.startswith(f"blocks.{i}.")}
        of_mixer = {key.removeprefix("mixer."): value for key, value in mine.items() if key.startswith("mixer.")}
        y = SLOW_MIXERS[name](slow_norm(x, mine, "norm1", rms), of_mixer, config)
        x = [x[t] + y[t] for t in range(len(x))]
        y = slow_norm(x, mine, "norm2", rms)
        if config.mlp:
            up = [mine["mlp.gate_and_up.weight"] @ v for v in y]
            y = [mine["mlp.down.weight"] @ (silu(v[: config.mlp]) * v[config.mlp :]) for v in up]
        x = [x[t] + y[t] for t in range(len(x))]
    return torch.stack([w["embedding.weight"] @ v for v in slow_norm(x, w, "norm", rms)])


CONFIGS = {
    "recall, softmax": dict(mixers=("short_conv", "attention"), init="wide"),
    "recall, rebased": dict(mixers=("short_conv", "rebased"), init="wide"),
    "the paper's recall": dict(mixers=("short_conv", "rebased"), positions=11, bias=True),
    "the paper's softmax": dict(mixers=("attention", "attention"), positions=11, bias=True),
    "the paper's Pile": dict(mixers=("gated_conv", "rebased"), norm="rms", mlp=8),
}


@pytest.fixture(params=CONFIGS, scope="module")
def beside(request):
    """A model, every parameter moved away from where it starts, and its slow twin: {name: leaf}."""
    torch.manual_seed(0)
    config = m.ModelConfig(vocab_size=20, d_model=12, heads=3, feature_dim=4, **CONFIGS[request.param])
    fast = m.LanguageModel(config).double().eval()
    with torch.no_grad():
        for parameter in fast.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    slow = {name: value.detach().clone().requires_grad_() for name, value in fast.named_parameters()}
    return fast, slow


def slow_logits(slow, config, tokens):
    return torch.stack([slow_model(slow, config, sequence) for sequence in tokens.tolist()])


def test_logits_and_gradients_are_those_of_the_slow_model(beside):
    fast, slow = beside
    tokens = TOKENS[:, :11]
    logits = fast(tokens)
    expected = slow_logits(slow, fast.config, tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-10)
    upstream = torch.randn_like(logits)
    found = torch.autograd.grad(logits, list(fast.parameters()), upstream)
    theirs = torch.autograd.grad(expected, [slow[name] for name, _ in fast.named_parameters()], upstream)
    for (name, _), ours, wanted in zip(fast.named_parameters(), found, theirs, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-7, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")


@torch.no_grad()
def test_decoding_gives_the_logits_of_the_slow_model(beside):
    """Four tokens at once, then one by one: also where positions are learned."""
    fast, slow = beside
    tokens = TOKENS[:, :11]
    expected = slow_logits(slow, fast.config, tokens)
    logits, states = fast.prefill(tokens[:, :4])
    torch.testing.assert_close(logits, expected[:, 3], rtol=1e-9, atol=1e-10)
    for t in range(4, 11):
        logits, states = fast.step(tokens[:, t], states)
        torch.testing.assert_close(logits, expected[:, t], rtol=1e-9, atol=1e-10)


# States
@torch.no_grad()
@pytest.mark.parametrize("mlp", [0, 8])
@pytest.mark.parametrize("mixer", MIXERS + LAYERS)
def test_decoding_equals_forward(mixer, mlp):
    """Token by token; prefill cut at 9; prefill in two parts."""
    language_model = small(mixer, mlp)
    whole = language_model(TOKENS)
    states = None
    for t in range(25):
        logits, states = language_model.step(TOKENS[:, t], states)
        torch.testing.assert_close(logits, whole[:, t], rtol=1e-8, atol=1e-10)
    assert len(states.layers) == 2
    assert states.length == 25
    _, states = language_model.prefill(TOKENS[:, :9])
    logits, states = language_model.prefill(TOKENS[:, 9:], states)
    torch.testing.assert_close(logits, whole[:, -1], rtol=1e-8, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("mixer", MIXERS + LAYERS)
def test_the_future_cannot_change_the_past(mixer):
    language_model = small(mixer)
    others = TOKENS.clone()
    others[:, 13:] = (others[:, 13:] + 1) % 20
    before = language_model(TOKENS)
    after = language_model(others)
    torch.testing.assert_close(before[:, :13], after[:, :13], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(before[:, 13:], after[:, 13:])


@torch.no_grad()
def test_states_of_constant_and_growing_size():
    """In memory, and in a file: no state holds the rows that it came from."""
    for mixer, grows in (("rebased", False), ("based", False), ("gated_conv", False), ("conv_attention", True)):
        language_model = small(mixer)
        sizes = []
        files = []
        for T in (5, 25):
            _, states = language_model.prefill(TOKENS[:, :T])
            sizes.append(m.state_bytes(states.layers))
            file = io.BytesIO()
            torch.save([tuple(state) for state in states.layers], file)
            files.append(file.tell())
        assert (sizes[1] > sizes[0]) == grows
        assert (files[1] > files[0] + 100) == grows


# A few places
@pytest.mark.parametrize("mixer", MIXERS + LAYERS)
def test_a_few_places_have_the_gradients_of_rows(mixer):
    """A loss at a few positions: the same parameter gradients through `logits_at` as through all logits."""
    language_model = small(mixer)
    gradients = []
    for logits in (language_model.logits_at(TOKENS, POSITIONS), m.rows(language_model(TOKENS), POSITIONS)):
        gradients.append(torch.autograd.grad(logits.square().sum(), list(language_model.parameters())))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


@torch.no_grad()
def test_many_places_take_the_other_form():
    """More positions than features: all positions are computed, linear in T, and the rows are the same."""
    positions = torch.arange(25).flip(0).expand(2, 25)
    for mixer in ("rebased", "elementwise"):
        language_model = small(mixer)
        attention = language_model.blocks[-1].mixer
        assert positions.shape[1] > attention.kernel.num_features
        attention.weights = None  # it is not asked
        found = language_model.logits_at(TOKENS, positions)
        torch.testing.assert_close(found, m.rows(language_model(TOKENS), positions))


@torch.no_grad()
@pytest.mark.parametrize("mixer", ["attention", "based", "rebased", "elu"])
def test_weights_are_what_the_layer_uses(mixer):
    """weights @ v, through the output projection, is the mixer's output; at() has it at a few places."""
    attention = small(mixer).blocks[-1].mixer
    x = torch.randn(2, 25, 12, dtype=torch.float64)
    weights = attention.weights(x, torch.arange(25).expand(2, 25))
    assert weights.shape == (2, 3, 25, 25)
    o = weights @ m.split_heads(attention.v(x), 3)
    y = attention.out(m.join_heads(o))
    torch.testing.assert_close(y, attention(x), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(attention.at(x, POSITIONS), m.rows(attention(x), POSITIONS), rtol=1e-8, atol=1e-10)


@torch.no_grad()
def test_weights_have_the_digits_of_float32():
    """In half precision and under autocast: rows sum to 1, also the first, whose normaliser may be tiny."""
    positions = torch.arange(4).expand(2, 4)
    for mixer in ("rebased", "attention"):
        exact = small(mixer).float()
        with torch.autocast("cpu", torch.bfloat16):
            _, weights = exact.logits_at(TOKENS, positions, return_weights=True)
        digits = 1e-2 if mixer == "attention" else 1e-5  # softmax cannot vanish: autocast may round it
        torch.testing.assert_close(weights.float().sum(-1), torch.ones(2, 3, 4), rtol=digits, atol=digits)
        logits, weights = exact.bfloat16().logits_at(TOKENS, positions, return_weights=True)
        assert logits.dtype == torch.bfloat16
        torch.testing.assert_close(weights.float().sum(-1), torch.ones(2, 3, 4), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("mixer", ["rebased", "attention"])
@torch.no_grad()
def test_weights_are_those_of_what_the_last_layer_reads(mixer):
    """As a whole forward pass hands it in: after the block's norm."""
    language_model = small(mixer)
    last = language_model.blocks[-1].mixer
    read = []
    hook = last.register_forward_pre_hook(lambda mixer, arguments: read.append(arguments[0]))
    language_model(TOKENS)
    hook.remove()
    _, weights = language_model.logits_at(TOKENS, POSITIONS, return_weights=True)
    torch.testing.assert_close(weights, last.weights(read[0], POSITIONS), rtol=1e-8, atol=1e-10)


def test_a_layer_without_weights_says_so():
    with pytest.raises(ValueError, match="'short_conv' has no attention weights"):
        small("short_conv").logits_at(TOKENS, POSITIONS, return_weights=True)


def test_causal_conv_is_conv1d():
    conv = torch.nn.Conv1d(6, 6, 3, groups=6)
    x = torch.randn(2, 10, 6)
    y, last = m.causal_conv3(x, conv.weight, conv.bias, None)
    expected = conv(torch.nn.functional.pad(x.mT, (2, 0))).mT
    torch.testing.assert_close(y, expected)
    assert torch.equal(last, x[:, -2:])


# Speaking
@torch.no_grad()
def test_generate_is_greedy_argmax_and_reproducible():
    language_model = small("rebased")
    tokens = TOKENS[:, :5]
    for chosen in m.generate(language_model, tokens.clone(), steps=6):
        assert torch.equal(chosen, language_model(tokens)[:, -1].argmax(-1))
        tokens = torch.cat([tokens, chosen[:, None]], 1)
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        runs.append(torch.stack(list(m.generate(language_model, TOKENS, 8, temperature=1.5, top_k=4)), 1))
    assert torch.equal(*runs)
    assert runs[0].shape == (2, 8)


def test_probabilities_are_exact():
    """Temperature divides the logits; top-k keeps k, of equals too; by hand."""
    logits = torch.tensor([[0.0, math.log(2), math.log(4), math.log(8)]], dtype=torch.float64)

    def probabilities(*options):
        return m.token_probabilities(logits, *options)[0].tolist()

    assert probabilities() == pytest.approx([1 / 15, 2 / 15, 4 / 15, 8 / 15])
    assert probabilities(0.5) == pytest.approx([1 / 85, 4 / 85, 16 / 85, 64 / 85])
    assert probabilities(2.0, 2) == pytest.approx([0, 0, 2 / (2 + 8**0.5), 8**0.5 / (2 + 8**0.5)])
    assert probabilities(1.0, 1) == [0, 0, 0, 1]
    assert probabilities(1.0, 9) == probabilities(1.0, 4) == probabilities()
    equal = m.token_probabilities(torch.zeros(1, 6), 1.0, 2)[0]
    assert (equal > 0).sum() == 2
    assert equal.max() == 0.5


@torch.no_grad()
def test_generate_draws_from_these_probabilities():
    """With the same seed, the tokens that a draw by hand gives."""
    language_model = small("based")
    torch.manual_seed(1)
    (chosen,) = m.generate(language_model, TOKENS, 1, temperature=3.0, top_k=3)
    largest, places = (language_model(TOKENS)[:, -1] / 3.0).topk(3)
    probabilities = torch.zeros(2, 20, dtype=torch.float64).scatter(1, places, largest.softmax(-1))
    torch.manual_seed(1)
    assert torch.equal(chosen, torch.multinomial(probabilities, 1).squeeze(1))
    for seed in range(20):
        torch.manual_seed(seed)
        (chosen,) = m.generate(language_model, TOKENS, 1, temperature=3.0, top_k=3)
        assert (places == chosen[:, None]).any(1).all()


@torch.no_grad()
def test_generate_goes_on_from_states():
    language_model = small("rebased")
    _, states = language_model.prefill(TOKENS[:, :20])
    resumed = list(m.generate(language_model, TOKENS[:, 20:], 5, states=states))
    assert all(map(torch.equal, resumed, m.generate(language_model, TOKENS, 5)))


# What models are made of
PUBLISHED = [  # mixer, positions that fit, {d_model: parameters} [1, Table 6]
    ("based", 256, {64: 577_984, 128: 1_179_520, 256: 2_459_392, 512: 5_307_904}),
    ("rebased", 256, {64: 578_752, 128: 1_180_288, 256: 2_460_160, 512: 5_308_672}),
    ("attention", 1024, {64: 623_744, 128: 1_313_024, 256: 2_888_192, 512: 6_824_960}),
    ("conv_attention", 512, {64: 578_752}),
    ("conv_attention", 128, {128: 1_149_312, 256: 2_462_464, 512: 5_580_288}),
]
PUBLISHED_PILE = {"attention": 151_880_448, "based": 147_542_016, "rebased": 147_548_928}  # [1, Table 2]


@pytest.mark.parametrize("mixer, positions, counts", PUBLISHED)
def test_published_counts_mqar(mixer, positions, counts):
    """[1] Table 6, written out: 8,192 and `positions` rows of tables, two layers, five norms."""
    for d, count in counts.items():
        assert m.count_parameters(m.mqar_config(mixer, d, positions)) == count
        layers = 2 * 192 * d + 2 * d * 12 * (d // 12)
        if mixer == "rebased":
            layers += 4 * 192
        if mixer in ("attention", "conv_attention"):
            layers = 4 * d * d + 4 * d
        below = layers if mixer == "attention" else d * d + d + 3 * d + d
        assert count == (8192 + positions) * d + below + layers + 10 * d


@pytest.mark.parametrize("mixer, count", PUBLISHED_PILE.items())
def test_published_counts_pile(mixer, count):
    """[1] Table 2, written out."""
    d = 768
    softmax = 12 * (4 * d * d + 3 * d * 3072) + 25 * d
    conv = 4 * d * d + 4 * d + 2 * d * d + d + 3 * 2 * d
    linear = 2 * d * 192 + 2 * d * d + (4 * 192 if mixer == "rebased" else 0)
    layers = softmax if mixer == "attention" else 9 * (conv + linear) + 18 * 3 * d * 1536 + 37 * d
    assert m.count_parameters(m.pile_config(mixer)) == count == 50280 * d + layers


def test_initialisation():
    """N(0, 0.02) by default; the laptop experiment: 1/√fan_in, embedding 0.1, gate bias 1."""
    torch.manual_seed(0)
    paper = m.LanguageModel(m.mqar_config("rebased", 64, 128))
    assert abs(paper.blocks[1].mixer.q.weight.std() - 0.02) < 1e-3
    assert abs(paper.embedding.weight.std() - 0.02) < 1e-3
    assert paper.blocks[0].mixer.gate.bias.abs().max() == 0
    assert 0.55 < paper.blocks[0].mixer.conv.weight.abs().max() <= 3**-0.5  # as nn.Conv1d makes it
    laptop = m.LanguageModel(m.recall_config("rebased"))
    first = laptop.blocks[0].mixer
    assert abs(laptop.blocks[1].mixer.v.weight.std() - 1 / 8) < 0.01
    assert abs(laptop.blocks[1].mixer.q.weight.std() - 1 / 8) < 0.02  # 64 inputs, 16 outputs
    assert abs(laptop.embedding.weight.std() - 0.1) < 0.01
    assert abs(first.conv.weight.std() - 3**-0.5) < 0.06
    assert first.conv.bias.abs().max() == 0
    assert abs(first.gate.weight.std() - 0.02) < 0.002
    assert (first.gate.bias == 1).all()


def test_the_papers_recall_models_have_its_dropout():
    """.1 of the embedding, but none in Mamba's, and .1 of softmax's weights."""
    for mixer in ("attention", "conv_attention", "rebased"):
        config = m.mqar_config(mixer, 64, 128)
        assert (config.dropout, config.attention_dropout) == (0.1, 0.1)
        assert config.heads == (12 if mixer == "rebased" else 1) and config.bias


@torch.no_grad()
def test_weights_that_are_all_0_make_no_nan():
    """0/(0 + ε): nothing is read."""
    attention = small("x2").blocks[-1].mixer
    weights = attention.weights(torch.zeros(2, 25, 12, dtype=torch.float64), POSITIONS)
    assert torch.equal(weights, torch.zeros(2, 3, 3, 25, dtype=torch.float64))


def test_dropout_acts_in_training_only():
    """Of the embedding, and of the weights of softmax: through forward and through logits_at."""
    for options in ({"dropout": 0.5}, {"attention_dropout": 0.5}):
        language_model = m.LanguageModel(m.ModelConfig(("short_conv", "attention"), 20, 12, **options))
        calls = partial(language_model, TOKENS), partial(language_model.logits_at, TOKENS, POSITIONS)
        for call in calls:
            language_model.train()
            assert not torch.equal(call(), call())
            language_model.eval()
            assert torch.equal(call(), call())


@pytest.mark.parametrize(
    "settings",
    [
        {"mixers": ("rebasd",)},
        {"mixers": ()},
        {"vocab_size": 0},
        {"d_model": 0},
        {"heads": 0},
        {"feature_dim": 0},
        {"norm": "batch"},
        {"init": "zero"},
        {"positions": -1},
        {"mlp": -1},
        {"dropout": 1.0},
        {"heads": 13},
        {"mixers": ("attention",), "heads": 5},
    ],
)
def test_impossible_models_are_named(settings):
    good = {"mixers": ("short_conv", "rebased"), "vocab_size": 20, "d_model": 12, "heads": 3}
    with pytest.raises(ValueError) as error:
        m.ModelConfig(**(good | settings))
    assert len(str(error.value).splitlines()) <= 2


def test_unusable_tokens_are_named():
    language_model = m.LanguageModel(m.ModelConfig(("short_conv", "rebased"), 20, 12, positions=25))
    for bad in (TOKENS.float(), TOKENS[0], TOKENS[:, :0]):
        with pytest.raises(ValueError, match="tokens must be int64"):
            language_model(bad)
    for bad in (TOKENS + 1, TOKENS - 1):
        with pytest.raises(ValueError, match="below 20"):
            language_model(bad)
    with pytest.raises(ValueError, match="25 learned positions"):
        language_model(torch.cat([TOKENS, TOKENS[:, :1]], 1))
    _, states = language_model.prefill(TOKENS)
    with pytest.raises(ValueError, match="25 learned positions"):
        language_model.step(TOKENS[:, 0], states)
    for options in ({"temperature": -1.0}, {"temperature": math.nan}, {"top_k": 0}):
        with pytest.raises(ValueError, match="need temperature"):
            list(m.generate(language_model, TOKENS, 1, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_temperature_near_0_is_greedy(dtype):
    """Logits divided by 1e-45 would be infinite, and by 1e-310 too."""
    language_model = small("rebased").to(dtype)
    greedy = torch.stack(list(m.generate(language_model, TOKENS, 4)), 1)
    for temperature in (1e-310, 1e-45, 1e-30):
        found = torch.stack(list(m.generate(language_model, TOKENS, 4, temperature)), 1)
        assert torch.equal(found, greedy)


@pytest.mark.parametrize("mixer", ["rebased", "short_conv"])
def test_unusable_positions_are_named(mixer):
    language_model = small(mixer)
    for bad in (POSITIONS.float(), POSITIONS[0], POSITIONS[:1]):
        with pytest.raises(ValueError, match="positions must be int64 of shape"):
            language_model.logits_at(TOKENS, bad)
    for bad in (POSITIONS + 1, POSITIONS - 1):
        with pytest.raises(ValueError, match="positions must lie in 0 and below 25"):
            language_model.logits_at(TOKENS, bad)


# A new kernel is one class and one line
class SquaredCosine(kernels.Kernel):
    """cos² of the angle between q and k: no polynomial of s."""

    def features(self, x):
        unit = x / (x.norm(dim=-1, keepdim=True) + 1e-6)
        return kernels.symmetric_products(unit)


def test_a_new_kernel_needs_nothing_but_its_name(monkeypatch):
    with pytest.raises(ValueError, match="unknown mixer 'cosine'"):
        m.recall_config("cosine")
    monkeypatch.setitem(kernels.KERNELS, "cosine", SquaredCosine)
    language_model = small("cosine")
    whole = language_model(TOKENS)
    whole.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in language_model.parameters())
    with torch.no_grad():
        _, states = language_model.prefill(TOKENS[:, :24])
        logits, _ = language_model.step(TOKENS[:, 24], states)
        torch.testing.assert_close(logits, whole[:, -1])
        torch.testing.assert_close(language_model.logits_at(TOKENS, POSITIONS), m.rows(whole, POSITIONS))
    assert m.mqar_config("cosine", 64, 128).heads == 12
    assert m.count_parameters(m.pile_config("cosine")) == PUBLISHED_PILE["based"]


def test_a_new_block_needs_nothing_but_its_forward(monkeypatch):
    """A block that keeps its state as the sum of all rows."""

    class SumBlock(torch.nn.Module):
        def __init__(self, config, layer):
            super().__init__()

        def forward(self, x, state=None, return_state=False):
            start = 0 if state is None else state
            y = start + x.cumsum(1)
            return (y, y[:, -1:].clone()) if return_state else y

    monkeypatch.setitem(m.BLOCKS, "sum", SumBlock)
    language_model = small("sum")
    whole = language_model(TOKENS)
    _, states = language_model.prefill(TOKENS[:, :24])
    torch.testing.assert_close(language_model.step(TOKENS[:, 24], states)[0], whole[:, -1])
    torch.testing.assert_close(language_model.logits_at(TOKENS, POSITIONS), m.rows(whole, POSITIONS))


# What the lesson shows
def test_what_a_query_sees(capsys):
    m.show_what_a_query_sees()
    without, convolution, gate = [line.split("    ")[-1] for line in capsys.readouterr().out.splitlines()[1:4]]
    assert without == "1.00 of a"
    assert convolution == "0.50 of 7, 0.50 of ."
    assert gate == "1.00 of 7"


def test_what_a_state_knows(capsys):
    """The tokens after a state are those after the whole prompt, and not one token eight times."""
    m.show_what_a_state_knows()
    prompt, whole, resumed, alone = [line.split()[-8:] for line in capsys.readouterr().out.splitlines()[:4]]
    assert whole == resumed and len(set(whole)) > 2
    assert alone != whole and prompt[-4:] == [str(token) for token in TOKENS[0, :4].tolist()]


def test_what_a_token_costs(capsys):
    m.show_what_a_token_costs(contexts=(16, 64))
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if " KB" in line]
    assert [row[0] for row in rows] == ["conv_attention", "based", "rebased"]
    assert int(rows[0][1]) < int(rows[0][5])
    assert all(row[1] == row[5] for row in rows[1:])


def test_a_state_is_measured_in_bytes_and_its_quotient_is_that_of_softmax(capsys, monkeypatch):
    """Tensors of four and of eight bytes a number, in states of states; softmax divided by ReBased."""
    state = (torch.zeros(3, 4), [torch.zeros(5, dtype=torch.float64), (torch.zeros(2, dtype=torch.bfloat16),)])
    assert m.state_bytes(state) == 3 * 4 * 4 + 5 * 8 + 2 * 2
    sizes = {("conv_attention", 16): 6144, ("based", 16): 1024, ("rebased", 16): 2048}
    seconds = {("conv_attention", 16): 0.001, ("based", 16): 0.002, ("rebased", 16): 0.004}
    monkeypatch.setattr(m, "costs_of_a_token", lambda mixers, contexts: (sizes, seconds))
    m.show_what_a_token_costs(contexts=(16,))
    assert capsys.readouterr().out.splitlines()[-2].split() == ["quotient", "3.0", "0.2"]


@pytest.mark.slow
def test_a_compiled_model_trains_as_the_plain_one():
    """torch.compile leaves the chunked form as it is, at a length of several chunks, forward and backward."""
    tokens = torch.randint(20, (2, 700), generator=torch.Generator().manual_seed(1))
    gradients = []
    for compiled in (False, True):
        language_model = m.small_model("rebased", mlp=8)
        (torch.compile(language_model) if compiled else language_model)(tokens).square().mean().backward()
        gradients.append([p.grad for p in language_model.parameters()])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
