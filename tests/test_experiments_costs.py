"""experiments/decoding.py, baselines_cost.py, training_profile.py: their tables, and that they time what they say."""

import pytest
import torch
import torch.nn.functional as F

from experiments import baselines_cost, decoding, training_profile
from rebased import lesson, model, train_mqar, train_pile

# Decoding
@torch.no_grad()
@pytest.mark.parametrize("mixer", ["conv_attention", "rebased"])
def test_states_have_the_shapes_of_real_ones(mixer):
    """Filled with random numbers, but as large as after a prefill of so many tokens, and a step can go on from them."""
    language_model = model.LanguageModel(model.recall_config(mixer, d_model=16, heads=2)).eval()
    tokens = torch.randint(256, (3, 40))
    _, expected = language_model.prefill(tokens)
    found = decoding.states_after(language_model, 40, batch=3)
    assert found.length == 40
    assert model.state_bytes(found.layers) == model.state_bytes(expected.layers)
    logits, states = language_model.step(tokens[:, 0], found)
    assert logits.shape == (3, 256)
    assert states.length == 41


def test_decoding_prints_both_tables(capsys, monkeypatch):
    measure = lesson.median_seconds
    monkeypatch.setattr(lesson, "median_seconds", lambda calls, repeats: measure(calls, 1))
    decoding.main(["--contexts", "8", "32", "--batches", "1", "2", "--kernels", "rebased"])
    out = capsys.readouterr().out
    assert out.count("  its attention alone") == 2
    assert "batch 2   conv_attention               3.7" in out  # not 4: the convolution's state stays
    assert "batch 2   rebased                      1.0" in out
    four_layers = [line for line in out.splitlines() if " KB" in line]
    assert [line.split()[0] for line in four_layers] == ["attention", "rebased"]
    assert "experiments/decoding.py --contexts 8 32" in out


# Baselines
def test_baselines_cost_prints_its_table(capsys, monkeypatch):
    monkeypatch.setattr(baselines_cost, "LENGTHS", (4, 8, 16))
    monkeypatch.setattr(baselines_cost, "TOKENS", 64)
    baselines_cost.main([])
    out = capsys.readouterr().out
    assert "rebased                   39,168 B" in out
    assert "mamba                      9,728 B" in out
    assert "rwkv, token by token       1,024 B" in out
    assert "times fewer numbers of the past" in out


# Profiles: cut off from each other, the stages still leave the gradients of the whole
@pytest.mark.parametrize("mixer", ["conv_attention", "rebased"])
@pytest.mark.parametrize("queries_only", [True, False])
def test_stages_of_04_have_the_gradients_of_a_step(mixer, queries_only):
    torch.manual_seed(0)
    language_model = model.LanguageModel(model.recall_config(mixer, d_model=16)).double()
    tokens, labels = train_mqar.make_mqar(4, 128, 16, 256, seed=3)
    logits = language_model(tokens)
    F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    expected = [p.grad.clone() for p in language_model.parameters()]
    language_model.zero_grad()

    class Collect:  # in place of an optimiser: looks at the gradients instead of using them
        def step(self):
            self.found = [p.grad.clone() for p in language_model.parameters()]

        def zero_grad(self):
            pass

    optimizer = Collect()
    clock = training_profile.Clock(training_profile.MQAR_STAGES)
    training_profile.mqar_step(language_model, optimizer, 256, 4, queries_only, 3, clock)
    for ours, theirs in zip(optimizer.found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-10)
    assert all(seconds > 0 for seconds in clock.spent.values())


def test_stages_of_05_have_the_gradients_of_a_step():
    torch.manual_seed(0)
    language_model = model.LanguageModel(train_pile.laptop_config("rebased", 256)).double()
    tokens = torch.randint(256, (2, 17))
    train_pile.next_token_losses(language_model, tokens).mean().backward()
    expected = [p.grad.clone() for p in language_model.parameters()]
    language_model.zero_grad()
    clock = training_profile.Clock(training_profile.PILE_STAGES)
    training_profile.micro_batch(language_model, tokens, 1.0, clock)
    for p, theirs in zip(language_model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, theirs, rtol=1e-7, atol=1e-10)


def test_a_profile_is_a_median_over_steps(capsys):
    stages = ("one", "two")
    times = training_profile.profile(lambda n, clock: (clock("one"), clock("two")), stages)
    assert set(times) == set(stages)
    training_profile.print_head("a name", stages, 14)
    training_profile.print_profile("rebased", {"one": 1.0, "two": 3.0}, 14)
    assert "1.0 (25%)     3.0 (75%)      4.0" in capsys.readouterr().out
