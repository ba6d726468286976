"""5a · What three perplexities say                                      (warm-up, 15 minutes)

Connects to 05_train_pile.py, "Numbers that can be compared" and "Which tokens could be recalled".

A paper prints the perplexity of all tokens, of the AR tokens, and of the others, but not how many
tokens it counted as AR. The three numbers give it away. And whether two models with different
vocabularies can be compared is a matter of one division.

Write
  ar_share(all_tokens, ar, others)              which share of the tokens was counted as AR
  bits_per_byte(perplexity, tokens_per_byte)    a number without a vocabulary

Hint: which means may be taken apart, those of perplexities or those of losses?

Then apply it to the first row of Table 2 of the paper: 11.98, 3.07, 33.95. 05 prints three
definitions of an AR token and the share each takes: which is the paper's likely to be near?

Check: python -m pytest course -k 5a
"""

import math  # noqa: F401

def ar_share(all_tokens, ar, others):
    """The share of AR tokens, from three perplexities: a float from 0 to 1."""
    # Your code.


def bits_per_byte(perplexity, tokens_per_byte):
    """Bits per byte of a text that has so many tokens a byte (GPT-2 on the Pile: 0.293)."""
    # Your code.
