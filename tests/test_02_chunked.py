"""The specification of 02_linear_attention_chunked.py beyond the values, which test_02_linear_attention.py holds for every
form: heads in groups, threads, the choice of the chunk, what is kept for the backward pass."""

from importlib import import_module

import pytest
import torch

kernels = import_module("01_kernels")
la = import_module("02_linear_attention")
chunked = import_module("02_linear_attention_chunked")


@pytest.fixture
def threads():
    """torch.set_num_threads, set back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("check", chunked.CHECKS, ids=lambda check: check.__name__)
def test_claims_of_the_file(check):
    check()


def results(inputs, kernel):
    o, state = la.chunked_attention(*inputs, kernel, return_state=True, chunk_size=8)
    return [o, *state, *torch.autograd.grad(o.sin().sum() + state.S.sum() + state.z.sum(), inputs)]


@pytest.mark.parametrize("groups", [[slice(0, 9)], [slice(0, 5), slice(5, 9)], [slice(n, n + 1) for n in range(9)]])
@pytest.mark.parametrize("count", [1, 3])
def test_heads_in_groups_and_threads_change_nothing(groups, count, monkeypatch, threads):
    """Any split of B·H, on one thread or three: outputs, states and gradients equal those of the four steps."""
    kernel = kernels.ReBasedKernel(4, heads=3)
    inputs = la.example(kernel, T=30, B=3)
    o, state = la.chunked_in_four_steps(*inputs, kernel, return_state=True)
    expected = [o, *state, *torch.autograd.grad(o.sin().sum() + state.S.sum() + state.z.sum(), inputs)]
    monkeypatch.setattr(chunked, "head_groups", lambda q: groups)
    threads(count)
    for found, wanted in zip(results(inputs, kernel), expected, strict=True):
        assert la.distance([found], [wanted]) < 1e-9


def test_head_groups_cover_every_head_once(threads):
    for count in (1, 2, 3, 7):
        threads(count)
        for N in (1, 2, 5, 16, 100):
            covered = [n for heads in chunked.head_groups(torch.zeros(N, 1, 1)) for n in range(N)[heads]]
            assert covered == list(range(N))


def test_chunk_choice_follows_the_cost():
    """Short sequences are one chunk; long ones are not cut to pieces, nor left quadratic."""
    assert chunked.best_chunk(4, 20, 16, 80, 136, threads=1) == 20
    one, two = (chunked.best_chunk(4, 32_768, 16, 80, 136, threads) for threads in (1, 2))
    assert 64 <= one <= two <= 256


def test_features_are_not_kept():
    """For the backward pass: inputs, output, 1/den and one state a chunk, whatever P·T would be."""
    kernel, T, C = kernels.ReBasedKernel(16), 1024, 128
    inputs = [torch.rand(1, 2, T, size, requires_grad=True) for size in (16, 16, 24)]
    states = T // C * 2 * 136 * 32 * 4
    kept = chunked.kept_bytes(lambda: la.chunked_attention(*inputs, kernel, chunk_size=C))
    assert kept == sum(x.nbytes for x in inputs) + inputs[2].nbytes + 4 * 2 * T + states
    assert chunked.kept_bytes(lambda: la.chunked_in_four_steps(*inputs, kernel, chunk_size=C)) > 2 * kept
