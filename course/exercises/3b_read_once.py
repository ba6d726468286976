"""3b · Read a prompt once, score many answers                                  (20 minutes)

Connects to 03_model.py, "Tokens out of a state"; 02_linear_attention.py, "3. Recurrent: one token
at a time": a state is a value, one may go on from it twice.

A question with four possible answers: which one does a model find likeliest? (That is how
multiple-choice benchmarks are scored.) The slow way reads the question four times. Read it once.

Write
  score(model, prompt, answers)   ln p(answer | prompt) of each

Hint: `model.prefill(prompt)` gives the logits of the next token and the states; `model.step(token,
states)` goes on by one token and leaves the states that it was given as they were.

Check: python -m pytest course -k 3b
"""

import torch

@torch.no_grad()
def score(model, prompt, answers):
    """ln p of every answer after the prompt: a list of floats.

    prompt: (1, T) int64. answers: a list of int64 tensors (n,), each with its own n >= 1. The model
    may see each token of the prompt once, and each token of an answer once.
    """
    # Your code.
