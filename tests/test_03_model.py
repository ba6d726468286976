"""The specification of 03_model.py: every mixer, decoding, rows, counts, errors."""

from importlib import import_module

import pytest
import torch

kernels = import_module("01_kernels")
la = import_module("02_linear_attention")
m = import_module("03_model")
MIXERS = ["conv_attention", *m.MIXER_NAMES]
TOKENS = torch.randint(20, (2, 25), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("check", m.CHECKS, ids=lambda check: check.__name__)
def test_claims_of_the_file(check):
    check()


@torch.no_grad()
@pytest.mark.parametrize("mlp", [0, 8])
@pytest.mark.parametrize("mixer", MIXERS)
def test_decoding_equals_forward(mixer, mlp):
    """Token by token; prefill cut at 9; prefill in two parts."""
    model = m.small_model(mixer, mlp)
    whole, states = model(TOKENS), None
    for t in range(25):
        logits, states = model.step(TOKENS[:, t], states)
        torch.testing.assert_close(logits, whole[:, t], rtol=1e-8, atol=1e-10)
    assert len(states) == 2 and states.length == 25
    _, states = model.prefill(TOKENS[:, :9])
    logits, states = model.prefill(TOKENS[:, 9:], states)
    torch.testing.assert_close(logits, whole[:, -1], rtol=1e-8, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("mixer", MIXERS)
def test_the_future_cannot_change_the_past(mixer):
    model, others = m.small_model(mixer), TOKENS.clone()
    others[:, 13:] = (others[:, 13:] + 1) % 20
    torch.testing.assert_close(model(TOKENS)[:, :13], model(others)[:, :13], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(model(TOKENS)[:, 13:], model(others)[:, 13:])


@pytest.mark.parametrize("mixer", MIXERS)
def test_rows_have_the_gradients_of_rows(mixer):
    """A loss at a few positions: the same parameter gradients through `positions` as through all logits."""
    model, positions = m.small_model(mixer), torch.tensor([[3, 24, 0], [7, 8, 20]])
    gradients = []
    for logits in (model(TOKENS, positions), m.rows(model(TOKENS), positions)):
        model.zero_grad()
        logits.square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def test_many_rows_take_the_other_form():
    """More positions than features: all positions are computed, linear in T, and the rows are the same."""
    positions = torch.arange(25).flip(0).expand(2, 25)
    for mixer in ("rebased", "elementwise"):
        model = m.small_model(mixer)
        assert positions.shape[1] > model.blocks[-1].mixer.kernel.num_features
        torch.testing.assert_close(model(TOKENS, positions), m.rows(model(TOKENS), positions))


def test_causal_conv_is_conv1d():
    conv = torch.nn.Conv1d(6, 6, 3, groups=6)
    x = torch.randn(2, 10, 6)
    y, last = m.causal_conv3(x, conv.weight, conv.bias, None)
    expected = conv(torch.nn.functional.pad(x.mT, (2, 0))).mT
    torch.testing.assert_close(y, expected)
    assert torch.equal(last, x[:, -2:])


@torch.no_grad()
def test_weights_are_what_the_layer_uses():
    """weights @ v, through the output projection, is the mixer's output."""
    for mixer in ("attention", "based", "rebased"):
        block = m.small_model(mixer).blocks[-1]
        x, positions = torch.randn(2, 25, 12, dtype=torch.float64), torch.arange(25).expand(2, 25)
        weights = block.mixer.weights(x, positions)
        o = weights @ m.split_heads(block.mixer.v(x), 3)
        torch.testing.assert_close(
            block.mixer.out(o.transpose(1, 2).flatten(2)), block.mixer(x)[0], rtol=1e-8, atol=1e-10
        )


@torch.no_grad()
def test_states_of_constant_and_growing_size():
    for mixer, grows in (("rebased", False), ("based", False), ("conv_attention", True)):
        model = m.small_model(mixer)
        sizes = [m.state_bytes(model.prefill(TOKENS[:, :n])[1]) for n in (5, 25)]
        assert (sizes[1] > sizes[0]) == grows


@torch.no_grad()
def test_generate_is_greedy_argmax_and_reproducible():
    model = m.small_model("rebased")
    tokens = TOKENS[:, :5]
    for chosen in m.generate(model, tokens.clone(), steps=6):
        assert torch.equal(chosen, model(tokens)[:, -1].argmax(-1))
        tokens = torch.cat([tokens, chosen[:, None]], 1)
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        runs.append(torch.stack(list(m.generate(model, TOKENS, 8, temperature=1.5, top_k=4)), 1))
    assert torch.equal(*runs) and runs[0].shape == (2, 8)


@torch.no_grad()
def test_top_k_takes_the_k_likeliest():
    model = m.small_model("based")
    allowed = model(TOKENS)[:, -1].topk(3).indices
    for seed in range(20):
        torch.manual_seed(seed)
        (chosen,) = m.generate(model, TOKENS, 1, temperature=3.0, top_k=3)
        assert (allowed == chosen[:, None]).any(1).all()


@pytest.mark.parametrize(
    "mixer, seq_len, counts",
    [
        ("based", 256, (577_984, 1_179_520, 2_459_392, 5_307_904)),
        ("rebased", 256, (578_752, 1_180_288, 2_460_160, 5_308_672)),
        ("attention", 1024, (623_744, 1_313_024, 2_888_192, 6_824_960)),
        ("rwkv", 1024, (623_872, 1_313_280, 2_888_704, 6_825_984)),
        ("mamba", 1024, (655_360, 1_413_120, 3_235_840, None)),
        ("mamba", 512, (None, None, None, 7_847_936)),
        ("conv_attention", 512, (578_752, None, None, None)),
        ("conv_attention", 128, (None, 1_149_312, 2_462_464, 5_580_288)),
    ],
)
def test_published_counts_mqar(mixer, seq_len, counts):
    """[P] Table 6; which length each row was counted at is said in mqar_config's source."""
    for d_model, count in zip((64, 128, 256, 512), counts, strict=True):
        assert count is None or m.count_parameters(m.mqar_config(mixer, d_model, seq_len)) == count


@pytest.mark.parametrize("mixer, count", [("attention", 151_880_448), ("based", 147_542_016), ("rebased", 147_548_928)])
def test_published_counts_pile(mixer, count):
    assert m.count_parameters(m.pile_config(mixer)) == count


def test_initialisation():
    """N(0, 0.02) by default; the laptop experiment: 1/√fan_in, embedding 0.1, gate bias 1."""
    torch.manual_seed(0)
    paper = m.LanguageModel(m.mqar_config("rebased", 64, 128))
    assert abs(paper.blocks[1].mixer.q.weight.std() - 0.02) < 1e-3 and paper.blocks[0].mixer.gate.bias.abs().max() == 0
    laptop = m.LanguageModel(m.recall_config("rebased"))
    assert abs(laptop.blocks[1].mixer.v.weight.std() - 1 / 8) < 0.01 and (laptop.blocks[0].mixer.gate.bias == 1).all()
    assert abs(laptop.embedding.weight.std() - 0.1) < 0.01


def test_dropout_acts_in_training_only():
    model = m.LanguageModel(m.ModelConfig(("short_conv", "attention"), 20, 12, dropout=0.5, attention_dropout=0.5))
    model.train()
    assert not torch.equal(model(TOKENS), model(TOKENS))
    model.eval()
    assert torch.equal(model(TOKENS), model(TOKENS))


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
    model = m.LanguageModel(m.ModelConfig(("short_conv", "rebased"), 20, 12, positions=25))
    for bad in (TOKENS.float(), TOKENS[0], TOKENS[:, :0]):
        with pytest.raises(ValueError, match="tokens must be int64"):
            model(bad)
    with pytest.raises(ValueError, match="25 learned positions"):
        model(torch.cat([TOKENS, TOKENS[:, :1]], 1))
    _, states = model.prefill(TOKENS)
    with pytest.raises(ValueError, match="25 learned positions"):
        model.step(TOKENS[:, 0], states)
    for options in ({"temperature": -1.0}, {"top_k": 0}):
        with pytest.raises(ValueError, match="temperature must be"):
            list(m.generate(model, TOKENS, 1, **options))


def test_token_numbers_beyond_the_vocabulary_are_named():
    model = m.LanguageModel(m.ModelConfig(("short_conv", "rebased"), 20, 12))
    with pytest.raises(ValueError, match="below 20"):
        model(TOKENS + 1)


def test_main(capsys):
    assert m.main([]) == 0
    out = capsys.readouterr().out
    assert "the same" in out and out.rstrip().endswith("0 failed")


@pytest.mark.slow
def test_a_compiled_model_trains_as_the_plain_one():
    """torch.compile leaves the chunked form as it is, at a length of several chunks, forward and backward."""
    tokens, gradients = torch.randint(20, (2, 700), generator=torch.Generator().manual_seed(1)), []
    for compiled in (False, True):
        model = m.small_model("rebased", mlp=8)
        (torch.compile(model) if compiled else model)(tokens).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
