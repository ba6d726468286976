"""The checks of 3a, 3b and 3c; how they find an answer: course/conftest.py.

PYTEST_DONT_REWRITE: a message of an assertion is all that a student should read.
"""

import torch

from course.answers import agree
from rebased import model as models

def real_state_numbers(mixer, T, d_model, heads, feature_dim):
    """The numbers in the state that a layer of 03 returns."""
    config = models.ModelConfig((mixer,), 10, d_model, heads, feature_dim)
    layer = models.Block(config, mixer)
    _, state = layer(torch.randn(1, T, d_model), return_state=True)
    parts = state if isinstance(state, tuple) else (state,)
    return sum(part.numel() for part in parts)


@torch.no_grad()
def test_3a_size_of_a_state(answer):
    for d_model, heads, feature_dim in ((64, 1, 16), (64, 12, 16), (60, 3, 5)):
        for mixer in ("short_conv", "attention", "based", "rebased", "elu"):
            if mixer == "attention" and d_model % heads:
                continue
            for T in (1, 3, 40):
                sizes = (mixer, T, d_model, heads, feature_dim)
                found = answer.ask("state_numbers", *sizes)
                expected = real_state_numbers(*sizes)
                told = f"state_numbers{sizes} = {found}; the layer of 03 holds {expected} numbers"
                assert found == expected, told
    sizes = (("rebased", 64, 1, 16), ("based", 60, 3, 5), ("elu", 64, 1, 16))
    for kernel, d_model, heads, D in sizes:
        T = answer.ask("crossover", kernel, d_model, heads, D)
        fixed = real_state_numbers(kernel, 1, d_model, heads, D)
        first = next(n for n in range(1, 10_000) if 2 * n * d_model > fixed)
        told = f"crossover({kernel!r}, {d_model}, {heads}, {D}) = {T}"
        assert T == first, f"{told}: softmax holds {2 * d_model} more a token, the kernel {fixed}"


class Counted:
    """How many tokens a model embeds from now on."""

    def __init__(self, model):
        self.tokens = 0
        self.embed = model.embed
        model.embed = self

    def __call__(self, tokens, start=0):
        self.tokens += tokens.numel()
        return self.embed(tokens, start)


@torch.no_grad()
def whole_sequences(model, prompt, answers):
    """The slow way: prompt and answer read together, for each answer anew."""
    scores = []
    for tokens in answers:
        logits = model(torch.cat([prompt[0], tokens]).unsqueeze(0))[0]
        places = torch.arange(len(tokens)) + prompt.shape[1] - 1
        scores.append(logits[places].log_softmax(-1)[torch.arange(len(tokens)), tokens].sum())
    return torch.stack(scores)


def test_3b_read_once(answer):
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(20, (1, 30), generator=generator)
    answers = [torch.randint(20, (n,), generator=generator) for n in (1, 4, 2, 4)]
    for mixer in ("rebased", "conv_attention"):
        model = models_small(mixer)
        expected = whole_sequences(model, prompt, answers)
        counted = Counted(model)
        found = answer.ask("score", model, prompt, answers)
        assert len(found) == 4, f"four answers, {len(found)} scores"
        agree(torch.tensor(found).double(), expected, f"ln p of four answers ({mixer})", 1e-6)
        told = f"the model was given {counted.tokens} tokens; the prompt has 30, the answers 11"
        assert counted.tokens <= 41, f"{told}: read the prompt once"


def models_small(mixer):
    """The small random model of 03, in float64."""
    return models.small_model(mixer, mlp=8, seed=3)


def slow_delta(q, k, v, b):
    """The rule for one head, with plain vectors: q, k (T, D), v (T, Dv), b (T,)."""
    S = torch.zeros(k.shape[1], v.shape[1], dtype=v.dtype)
    o = []
    for t in range(len(q)):
        key = k[t] / k[t].norm()
        S = S + b[t] * torch.outer(key, v[t] - S.T @ key)
        o.append(S.T @ (q[t] / q[t].norm()))
    return torch.stack(o)


def test_3c_delta_rule(answer, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, 3, 9, 4, generator=generator, dtype=torch.float64)
    v = torch.randn(2, 3, 9, 5, generator=generator, dtype=torch.float64)
    b = torch.rand(2, 3, 9, generator=generator, dtype=torch.float64)
    o, S = answer.ask("delta_recurrent", q, k, v, b)
    assert S.shape == (2, 3, 4, 5), f"S has the shape {tuple(S.shape)}, it should be (2, 3, 4, 5)"
    for row in range(2):
        for head in range(3):
            expected = slow_delta(q[row, head], k[row, head], v[row, head], b[row, head])
            agree(o[row, head], expected, "delta_recurrent: o of one head")
    _, S = answer.ask("delta_recurrent", q[:, :, :4], k[:, :, :4], v[:, :, :4], b[:, :, :4])
    rest, _ = answer.ask(
        "delta_recurrent", q[:, :, 4:], k[:, :, 4:], v[:, :, 4:], b[:, :, 4:], S
    )
    agree(rest, o[:, :, 4:], "cut at 4 and continued: o")

    k[:, :, 1] = 3 * k[:, :, 0]  # the same key, written again
    first_two = (k[:, :, :2], k[:, :, :2], v[:, :, :2], torch.ones(2, 3, 2, dtype=torch.float64))
    o, _ = answer.ask("delta_recurrent", *first_two)
    agree(o[:, :, 1], v[:, :, 1], "a key that is written twice with b = 1: what is read")
    check_mixer(answer, monkeypatch)


def check_mixer(answer, monkeypatch):
    """The mixer uses the rule, decodes as it trains, and learns with all its parameters."""
    calls = []
    rule = answer.get("delta_recurrent")

    def noted(*arguments, **options):
        calls.append(1)
        return rule(*arguments, **options)

    monkeypatch.setattr(answer.module, "delta_recurrent", noted)
    monkeypatch.setitem(models.MIXERS, "delta", answer.get("DeltaMixer"))
    model = models_small("delta")
    tokens = torch.randint(20, (2, 12), generator=torch.Generator().manual_seed(0))
    layer = model.blocks[-1].mixer
    y = layer(torch.randn(2, 3, 12, dtype=torch.float64))
    assert y is not None, "DeltaMixer.forward returns None: its body is yours to write"
    assert calls, "DeltaMixer should call delta_recurrent"
    whole = model(tokens)
    states = None
    for t in range(12):
        logits, states = model.step(tokens[:, t], states)
        agree(logits, whole[:, t], f"token by token: the logits at {t}", tolerance=1e-8)
    whole.logsumexp(-1).sum().backward()
    still = [name for name, p in layer.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still, f"no gradient reaches {', '.join(still)}"
