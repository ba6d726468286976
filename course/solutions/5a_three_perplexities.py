"""Solution of 5a: losses are averaged, perplexities are not. The paper's share is .43."""

import math

def ar_share(all_tokens, ar, others):
    """ln all = f · ln ar + (1 − f) · ln others, solved for f."""
    return math.log(others / all_tokens) / math.log(others / ar)


def bits_per_byte(perplexity, tokens_per_byte):
    """The loss of a token in bits, times the tokens of a byte."""
    return math.log2(perplexity) * tokens_per_byte
