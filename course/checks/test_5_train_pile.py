"""The checks of 5a, 5b and 5c; how they find an answer: course/conftest.py.

PYTEST_DONT_REWRITE: a message of an assertion is all that a student should read.
"""

import argparse
import math
import zlib
from pathlib import Path

import numpy as np

from rebased import train_pile

def test_5a_three_perplexities(answer):
    random = np.random.default_rng(0)
    for share in (0.1, 0.4, 0.9):
        ar = random.exponential(1.0, round(10_000 * share))
        others = random.exponential(3.5, 10_000 - len(ar))
        together = np.concatenate([ar, others])
        perplexities = [math.exp(part.mean()) for part in (together, ar, others)]
        found = answer.ask("ar_share", *perplexities)
        told = f"{share:.2f} of 10,000 tokens were AR, ar_share finds {found:.4f}"
        assert abs(found - share) < 1e-9, told
    for row in ((11.98, 3.07, 33.95), (12.99, 3.27, 37.02), (12.90, 3.25, 36.73)):
        found = answer.ask("ar_share", *row)
        assert 0.42 < found < 0.44, f"the paper's rows agree on .43; {row} gives you {found:.3f}"
    losses = random.exponential(2.0, 3000)  # nats, of a text of 10,000 bytes
    expected = train_pile.bits_per_byte(losses, 10_000)
    found = answer.ask("bits_per_byte", math.exp(losses.mean()), 3000 / 10_000)
    assert abs(found - expected) < 1e-9, f"05 says {expected:.4f} bits per byte, you {found:.4f}"


def slow_mask(context, distance):
    """For each token, look back over all pairs before it."""
    mask = []
    for t in range(len(context)):
        earlier = []
        for u in range(1, t):
            if t > 0 and context[u - 1] == context[t - 1] and context[u] == context[t]:
                earlier.append(u)
        mask.append(bool(earlier) and t - max(earlier) >= distance)
    return mask


def test_5b_far_tokens(answer):
    random = np.random.default_rng(0)
    for length, symbols in ((120, 3), (120, 12), (1, 2), (2, 1)):
        context = random.integers(symbols, size=length).astype(np.uint8)
        for distance in (1, 2, 5, 40):
            found = answer.ask("far_recall_mask", context, distance)
            expected = np.array(slow_mask(context, distance))
            assert len(found) == length, f"{length} tokens, a mask of {len(found)}"
            wrong = np.nonzero(np.asarray(found) != expected)[0]
            where = f"{length} tokens of {symbols} kinds, distance {distance}"
            assert not len(wrong), f"{where}: wrong first at token {wrong[:1]}"
    context = random.integers(256, size=5000).astype(np.uint8)
    near = np.asarray(answer.ask("far_recall_mask", context, 1))
    same = (near == train_pile.recall_mask(context, "bigram")).all()
    assert same, "with distance 1 it should be recall_mask(context, 'bigram') of 05"


def bits(predict, text, first):
    """Mean bits of the bytes of `text` from `first` on."""
    total = 0.0
    for t in range(first, len(text)):
        p = np.asarray(predict(text[:t]), dtype=np.float64)
        assert p.shape == (256,), f"predict should return 256 numbers, it has {p.shape}"
        good = (p > 0).all() and abs(p.sum() - 1) < 1e-6
        assert good, f"after {t} bytes: lowest {p.min():.1e}, sum {p.sum():.6f}; need above 0 and 1"
        total -= math.log2(p[text[t]])
    return total / (len(text) - first)


def counting(context):
    """What the bytes so far say without their order."""
    counts = np.bincount(np.frombuffer(context, dtype=np.uint8), minlength=256)
    return (counts + 0.01) / (len(context) + 2.56)


def test_5c_recall_alone(answer):
    answer.ask("predict", b"abcab")

    def predict(context):
        return answer.ask("predict", context)

    text = Path(argparse.__file__).read_bytes()[:6000]
    yours = bits(predict, text, 2000)
    counted = bits(counting, text, 2000)
    packed = 8 * (len(zlib.compress(text, 9)) - len(zlib.compress(text[:2000], 9))) / 4000
    print(f"\nbits per byte: counting {counted:.2f}, zlib {packed:.2f}, your model {yours:.2f}")
    told = f"{yours:.2f} bits per byte on Python's source, counting bytes needs {counted:.2f}"
    assert yours < 0.85 * counted, f"{told}; look-ups should save 15 % or more"
    block = np.random.default_rng(0).integers(256, size=400).astype(np.uint8).tobytes()
    second = bits(predict, block + block, 400)
    told = f"400 random bytes, seen a second time, cost {second:.2f} bits each"
    assert second < 2, f"{told}; a look-up knows them, trust a long match more"
