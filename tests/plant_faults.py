"""Faults planted one at a time into a copy of this repository: which of them do the quick tests notice?

  python tests/plant_faults.py                      all of them: two hours on one core, by estimate
  python tests/plant_faults.py --only mqar_report   those whose file or description holds the word
  python tests/plant_faults.py --processes 4        several copies at once

A test is worth what it notices, and coverage does not say that. So each record below names a file, a piece of its
text, what to put there instead, and the test files that concern it. The script copies the repository, exchanges the
text, runs these tests until the first one fails, and puts the text back. A fault that no test notices SURVIVED: write
the test that would have seen it, from a definition outside the code. Some faults change nothing that can be observed;
such a record says why in `same`, is not planted and not counted.

A text must occur exactly once in its file. tests/test_plant_faults.py checks that in the quick suite, so whoever
changes a line that is named here hears of it, and changes the record, too.
"""

import argparse
import itertools
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("torch", "numpy", "pytest", "hypothesis", "matplotlib.figure", "tqdm")
LEFT_OUT = shutil.ignore_patterns(".git", "runs", "__pycache__", ".pytest_cache", ".ruff_cache", "*.pyc")
LONGEST = 900  # seconds for the tests of one fault; the slowest of these files takes a minute on a free core


class Fault(NamedTuple):
    """One change of one file. tests: names of test files in tests/, as one text; same: why it is no fault at all."""

    file: str
    what: str
    text: str
    instead: str
    tests: str
    same: str = ""


def of(file, tests, rows):
    """Faults of one file: rows (what, text, instead), or with test files of their own as a fourth entry."""
    return [Fault(file, what, text, instead, *(more or (tests,))) for what, text, instead, *more in rows]


def same(file, what, text, instead, why):
    """A change that nobody can observe."""
    return Fault(file, what, text, instead, "", why)


FAULTS = []
FAULTS += of("01_kernels.py", "test_01_kernels.py", [
    ("s without its root", "/ math.sqrt(q.shape[-1])\n\n\ndef exp_scores",
     "/ q.shape[-1]\n\n\ndef exp_scores"),
    ("a pair counts once", "torch.where(a == b, once, 2.0)", "torch.where(a == b, once, 1.0)"),
    ("pairs in another order", "a, b = torch.triu_indices(D, D", "b, a = torch.tril_indices(D, D"),
    ("c0 for its root", "constant = math.sqrt(c0 * a_little_over_one(x))", "constant = c0 * a_little_over_one(x)"),
    ("squares as they are", "return 1 + x.shape[-1] * torch.finfo(dtype).eps", "return 1.0"),
    ("squares smaller by what they should be larger", "return 1 + x.shape[-1] * torch.finfo(dtype).eps",
     "return 1 - x.shape[-1] * torch.finfo(dtype).eps"),
    ("shares of unequal sums", "return weights / weights.sum(-1, keepdim=True)", "return weights / weights.sum()"),
    ("D for its root in the linear features", "math.sqrt(c1 / math.sqrt(D))", "math.sqrt(c1 / D)"),
    ("c2 for its root", "* math.sqrt(c2 / D)", "* (c2 / D)"),
    ("a floor may be no number", "if not 0 <= value < math.inf:", "if value < 0:"),
    ("the floor for its root among the features", "math.sqrt(self.floor))\n", "self.floor)\n"),
    ("Based's coefficients do not follow the floor", "return (0.5 + self.floor, 1.0, 0.5)", "return (1.0, 1.0, 0.5)"),
    ("ReBased's coefficients do not follow the floor", "return (self.floor, 0.0, 1.0)", "return (0.0, 0.0, 1.0)"),
    ("Based as a sum that cancels", "return (1 + scaled_dot(q, k)).square() / 2 + self.floor",
     "s = scaled_dot(q, k)\n"
     "        return 0.5 + s + s.square() / 2 + self.floor"),
    ("Based + norm: norm_k unused", "return self.norm_q(q), self.norm_k(k)", "return self.norm_q(q), self.norm_q(k)"),
    ("Based + norm: a norm of each head", "return self.norm_q(q), self.norm_k(k)",
     "apart = (self.heads, self.dim)\n"
     "        if isinstance(self.norm_q, nn.LayerNorm):\n"
     "            q, k = (F.layer_norm(x.unflatten(-1, apart), apart[1:]).flatten(-2) for x in (q, k))\n"
     "            q = q * self.norm_q.weight + self.norm_q.bias\n"
     "            k = k * self.norm_k.weight + self.norm_k.bias\n"
     "        return q, k"),
    ("Based + norm: another eps", "self.norm_k = nn.LayerNorm(heads * dim)",
     "self.norm_k = nn.LayerNorm(heads * dim, 1e-3)"),
    ("Based + norm: a norm without a scale and a shift", "self.norm_q = nn.LayerNorm(heads * dim)",
     "self.norm_q = nn.LayerNorm(heads * dim, elementwise_affine=False)"),
    ("ReBased's eps is 1e-3", "gamma, beta, eps=1e-5)", "gamma, beta, eps=1e-3)"),
    ("ReBased's eps is 1e-12", "gamma, beta, eps=1e-5)", "gamma, beta, eps=1e-12)"),
    ("ReBased's keys take the γ of queries", "self.place(k, self.gamma_k, self.beta_k)",
     "self.place(k, self.gamma_q, self.beta_k)"),
    ("ReBased's queries take the β of keys", "self.place(q, self.gamma_q, self.beta_q)",
     "self.place(q, self.gamma_q, self.beta_k)"),
    ("β is scaled by γ", "            x = x + beta\n",
     "            x = x + (beta if gamma is None else gamma * beta)\n"),
    ("γ starts at 0.1", "self.gamma_k = nn.Parameter(torch.ones(heads * dim))",
     "self.gamma_k = nn.Parameter(0.1 * torch.ones(heads * dim))"),
    ("β starts at 1", "self.beta_q = nn.Parameter(torch.zeros(heads * dim))",
     "self.beta_q = nn.Parameter(torch.ones(heads * dim))"),
    ("the element-wise kernel forgets its floor", "return self.add_floor(x.square())", "return x.square()"),
    ("the element-wise kernel squares the product", "return Kernel.scores(self, q, k)",
     "return super().scores(q, k)"),
    ("relu for elu", "F.elu(x) + 1", "F.relu(x) + 1"),
    ("the widths of k are not checked", 'check_last_dim(k, self.heads * self.dim, "k")\n'
     "        return q, k",
     "return q, k"),
    ("the scatter is squared", "place + scatter * noise", "place + scatter**2 * noise"),
    ("the right key is left out of the share", "return irrelevant / (irrelevant + right)",
     "return irrelevant / (irrelevant + 1)"),
    ("the mean share by a wrong logarithm", "1 - x * math.log(1 + 1 / x)", "1 - x * math.log(1 + x)"),
    ("weights at −s", "k[:, 0] = s\n", "k[:, 0] = -s\n"),
    ("the lowest point is the highest", "GRID[weights.argmin()].item()", "GRID[weights.argmax()].item()"),
])
FAULTS += of("rebased/__init__.py", "test_02_linear_attention.py test_chunked_cpu.py", [
    ("ε is 0", "EPS = 1e-12", "EPS = 0.0"),
    ("ε is 1e-6", "EPS = 1e-12", "EPS = 1e-6"),
    ("an unknown lesson gives None", "    if name not in LESSONS:\n        raise",
     "    if name not in LESSONS:\n        return None\n"
     "        raise",
     "test_house.py"),
])
FAULTS += of("02_linear_attention.py", "test_02_linear_attention.py", [
    ("quadratic without ε", "den = weights.sum(-1, keepdim=True)  # (B, H, T, 1)\n"
     "    return num / (den + EPS)",
     "den = weights.sum(-1, keepdim=True)  # (B, H, T, 1)\n"
     "    return num / den"),
    ("linear without ε", "den = (phi_q * z).sum(-1, keepdim=True)  # (B, H, T, 1)\n"
     "    return num / (den + EPS)",
     "den = (phi_q * z).sum(-1, keepdim=True)  # (B, H, T, 1)\n"
     "    return num / den"),
    ("recurrent without ε", "        outputs.append(num / (den + EPS))\n"
     "    o = torch.stack",
     "        outputs.append(num / den)\n    o = torch.stack"),
    ("chunked without ε", "        outputs.append(num / (den + EPS))\n\n        # 4.",
     "        outputs.append(num / den)\n\n        # 4."),
    ("quadratic sees the future", "kernel.scores(q, k).tril()  # (B, H, T, T)",
     "kernel.scores(q, k).tril(1)  # (B, H, T, T)"),
    ("quadratic outside of the common edges", "@attention_form\ndef quadratic_attention", "def quadratic_attention"),
    ("linear outside of the common edges", "@attention_form\ndef linear_attention", "def linear_attention"),
    ("recurrent outside of the common edges", "@attention_form\ndef recurrent_attention", "def recurrent_attention"),
    ("chunked outside of the common edges", "@attention_form\ndef chunked_attention", "def chunked_attention"),
    ("attention outside of the common edges", "@attention_form\ndef attention_on_cpu", "def attention_on_cpu"),
    ("recurrent: z is not added up", "z = z + phi_k[:, :, t]  #", "z = phi_k[:, :, t]  #"),
    ("recurrent: the state is not read", "S, z = state or empty_state(k, v, kernel)\n    phi_q",
     "S, z = empty_state(k, v, kernel)\n    phi_q"),
    ("chunked: the normaliser forgets the past", "den = den + phi_q @ z.unsqueeze(-1)",
     "den = den + 0 * z.unsqueeze(-1).sum()"),
    ("chunked: a chunk sees all of itself", "weights = kernel.scores(q_c, k_c).tril()  # (B, H, C, C)",
     "weights = kernel.scores(q_c, k_c)  # (B, H, C, C)"),
    ("chunked: only the last chunk is in the state", "S = S + phi_k.mT @ v_c", "S = phi_k.mT @ v_c"),
    ("attention hands no state on", "return attention_on_cpu(q, k, v, kernel, state, return_state)",
     "return attention_on_cpu(q, k, v, kernel, None, return_state)"),
    ("attention always begins anew", "    S, z = state or (None, None)\n    result = chunked_cpu",
     "    S, z = None, None\n    result = chunked_cpu"),
    ("a step hands no state on", "recurrent_attention(q, k, v, kernel, state, return_state=True)",
     "recurrent_attention(q, k, v, kernel, None, return_state=True)"),
    ("a step takes many tokens", "    check_one_token(q, k, v)\n", ""),
    ("a wrong size of chunk is taken", "    check_positive_integers(chunk_size=chunk_size)\n",
     "    chunk_size = int(chunk_size) or 1\n"),
    ("dq by hand without its 2", "ds = 2 * s * dw", "ds = s * dw"),
    ("calls are counted for each head", '"calls": calls * call,', '"calls": HEADS * calls * call,'),
    ("arithmetic of one head", '"arithmetic": HEADS * flops / flop_rate', '"arithmetic": flops / flop_rate'),
    ("what a form is bound by is the least part", "max(parts, key=parts.get)", "min(parts, key=parts.get)"),
    ("a form is timed that takes minutes", "last * GROWTH[form] < 2)", "last < 2)"),
    ("how often as long, upside down", 'measured[form, longest] / measured["chunked", longest]',
     'measured["chunked", longest] / measured[form, longest]'),
    ("measured over predicted, upside down", "measured[key] / predicted[key] for key",
     "predicted[key] / measured[key] for key"),
])
FAULTS += of("rebased/checks.py", "test_01_kernels.py test_02_linear_attention.py test_03_model.py", [
    ("forms run in the type of q", "torch.float64 if torch.float64 in (q.dtype, k.dtype, v.dtype) else torch.float32",
     "q.dtype"),
    ("float64 of v alone is not heeded", "torch.float64 in (q.dtype, k.dtype, v.dtype)", "q.dtype == torch.float64"),
    ("forms run under autocast", "with without_autocast(q.device):", "if True:"),
    ("o comes in the type of the sums", "            return result.to(v.dtype)", "            return result"),
    ("the state comes in the type of v", "return o.to(v.dtype), state",
     "return o.to(v.dtype), type(state)(*(x.to(v.dtype) for x in state))"),
    ("T of v is not compared", "k.shape[:3] != v.shape[:3]", "k.shape[:2] != v.shape[:2]"),
    ("an empty sequence is taken", "x.ndim != 4 or 0 in x.shape", "x.ndim != 4"),
    ("z is not compared", "state.S.shape != shape or state.z.shape != shape[:3]", "state.S.shape != shape"),
    ("any pair is a state", 'if not isinstance(state, tuple) or not hasattr(state, "S") or not hasattr(state, "z"):',
     "if not isinstance(state, tuple):"),
    ("integers pass as floats", "not isinstance(x, torch.Tensor) or not x.is_floating_point()",
     "not isinstance(x, torch.Tensor)"),
    ("the token V passes", "<= tokens.max() < vocab_size", "<= tokens.max() <= vocab_size"),
    ("negative tokens pass", "not 0 <= tokens.min() <=", "not tokens.min() <="),
    ("the place T passes", "<= positions.max() < T", "<= positions.max() <= T"),
    ("positions of one sequence for two", " or len(positions) != len(tokens):", ":"),
    ("positions of another type", "positions.dtype != torch.int64 or positions.ndim", "positions.ndim"),
    ("one token more than positions", "if length > positions:", "if length > positions + 1:"),
    ("heads need not divide a softmax", "config.d_model % config.heads", "False"),
    ("a dropout of 1", "0 <= config.dropout < 1 and", "0 <= config.dropout <= 1 and"),
    ("pairs without room for their queries", "if seq_len < 4 * num_pairs:",
     "if seq_len < 3 * num_pairs:",
     "test_04_train_mqar.py"),
    ("more keys than there are", "if num_pairs > vocab_size // 2 - 1:",
     "if num_pairs > vocab_size // 2:",
     "test_04_train_mqar.py"),
    ("seeds that PyTorch takes for others", "if not 0 <= seed < 2**32:",
     "if not 0 <= seed < 2**64:",
     "test_04_train_mqar.py"),
    ("True is a size", " or isinstance(value, bool) or value < 1", " or value < 1", "test_lesson.py"),
])
FAULTS += of("03_model.py", "test_03_model.py", [
    ("SwiGLU: sigmoid for silu", "self.down(F.silu(gate) * up)", "self.down(torch.sigmoid(gate) * up)"),
    ("SwiGLU: silu on the other half", "self.down(F.silu(gate) * up)", "self.down(gate * F.silu(up))"),
    ("the short convolution without its residual", "y = y * self.gate(u) + u", "y = y * self.gate(u)"),
    ("the gate of the convolved rows", "y = y * self.gate(u) + u", "y = y * self.gate(y) + u"),
    ("a block's second line without its residual", "return x + self.mlp(self.norm2(x))",
     "return self.mlp(self.norm2(x))"),
    ("a block's second line has the first norm", "return x + self.mlp(self.norm2(x))",
     "return x + self.mlp(self.norm1(x))"),
    ("a block's second line is not normalised", "return x + self.mlp(self.norm2(x))", "return x + self.mlp(x)"),
    ("a block's first line without its residual", "self.second_line(x + self.mixer(self.norm1(x), state))",
     "self.second_line(self.mixer(self.norm1(x), state))"),
    ("silu on the wrong half of the gated convolution", "y = self.out(a * F.silu(b))", "y = self.out(F.silu(a) * b)"),
    ("the head is detached from the embedding", "F.linear(self.norm(x), self.embedding.weight)",
     "F.linear(self.norm(x), self.embedding.weight.detach())"),
    ("the head without the last norm", "F.linear(self.norm(x), self.embedding.weight)",
     "F.linear(x, self.embedding.weight)"),
    ("learned positions restart at every call", "x = self.embed(tokens, states.length)", "x = self.embed(tokens)"),
    ("states do not count their tokens", "states.length + tokens.shape[1])", "tokens.shape[1])"),
    ("learned positions one place further", "self.position.weight[start:end]",
     "self.position.weight.roll(-1, 0)[start:end]"),
    ("a norm's eps is 1e-3", "return norm(config.d_model, eps=1e-5)", "return norm(config.d_model, eps=1e-3)"),
    ("layer norm where rms is asked for", 'nn.LayerNorm if config.norm == "layer" else nn.RMSNorm',
     "nn.LayerNorm if config.norm else nn.RMSNorm"),
    ("wide: the gate starts at 0", "nn.init.ones_(module.gate.bias)", "nn.init.zeros_(module.gate.bias)"),
    ("wide: the gate is drawn as other layers", "nn.init.normal_(module.gate.weight, std=0.02)", "pass"),
    ("wide: the convolution as PyTorch makes it", "nn.init.normal_(module.conv.weight, std=3**-0.5)", "pass"),
    ("wide: 1/√outputs", "module.in_features**-0.5", "module.out_features**-0.5"),
    ("wide: the embedding N(0, 0.02)", "std=0.1 if wide else 0.02", "std=0.02"),
    ("biases keep PyTorch's start", "nn.init.zeros_(module.bias)", "pass"),
    ("a convolution with its places exchanged", "w0, w1, w2 = weight", "w2, w1, w0 = weight"),
    ("a convolution without its bias", "        y = y + bias\n", "        y = y\n"),
    ("a convolution that sees one place ahead", "y = torch.addcmul(y, u[:, 2:], w2)",
     "y = torch.addcmul(y, u[:, 2:].roll(-1, 1), w2)"),
    ("a convolution keeps one row too old", "u[:, -2:].clone()", "u[:, -3:-1].clone()"),
    ("a convolution's state is a view", "u[:, -2:].clone()", "u[:, -2:]"),
    ("a convolution begins anew", "causal_conv3(u, self.conv.weight, self.conv.bias, state)",
     "causal_conv3(u, self.conv.weight, self.conv.bias, None)"),
    ("a gated convolution begins anew", "causal_conv3(a, self.conv.weight, None, state)",
     "causal_conv3(a, self.conv.weight, None, None)"),
    ("heads are interleaved", "x.unflatten(-1, (heads, -1)).transpose(1, 2)",
     "x.unflatten(-1, (-1, heads)).permute(0, 3, 1, 2)"),
    ("softmax: the past is masked", ".tril(past)", ".tril()"),
    ("softmax: new tokens see each other",
     "mask = torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past)",
     "mask = None"),
    ("softmax: dropout of weights always", "dropout = self.dropout if self.training else 0.0",
     "dropout = self.dropout"),
    ("softmax: no dropout of weights", "dropout = self.dropout if self.training else 0.0", "dropout = 0.0"),
    ("softmax: the newest value only", "v = torch.cat([state[1], v], dim=2)",
     "v = torch.cat([state[1], v.flip(2)], dim=2)"),
    ("kernel attention without `prepare`", "q, k = self.kernel.prepare(self.q(x), self.k(x))",
     "q, k = self.q(x), self.k(x)"),
    ("kernel attention: the queries are the keys", "q, k = self.kernel.prepare(self.q(x), self.k(x))",
     "q, k = self.kernel.prepare(self.k(x), self.k(x))"),
    ("kernel attention: a state is not read", "form(q, k, v, self.kernel, state, return_state=True)",
     "form(q, k, v, self.kernel, None, return_state=True)"),
    ("the kernel has one head", "kernels.KERNELS[name](config.feature_dim, config.heads)",
     "kernels.KERNELS[name](config.feature_dim)"),
    ("no dropout of the embedding", "return self.dropout(x)", "return x"),
    ("a model ends with its first block", "return self.head(self.blocks[-1](x))",
     "return self.head(self.blocks[0](x))"),
    ("prefill gives the first logits", "self.head(x[:, -1]), States", "self.head(x[:, 0]), States"),
    ("times for divided by the temperature", "logits = logits / temperature", "logits = logits * temperature"),
    ("top-k keeps k − 1", "logits.topk(top_k)", "logits.topk(max(1, top_k - 1))"),
    ("top-k keeps all that equal the k-th",
     "logits = torch.full_like(logits, -math.inf).scatter(-1, tokens, largest)",
     "logits = logits.masked_fill(logits < largest[:, -1:], -math.inf)"),
    ("top-k is not heeded", "if top_k is not None and top_k < logits.shape[-1]:", "if False:"),
    ("the likeliest is always taken", "torch.multinomial(probabilities, 1).squeeze(1)", "probabilities.argmax(-1)"),
    ("generate begins anew", "logits, states = model.prefill(tokens, states)\n    for",
     "logits, states = model.prefill(tokens)\n    for"),
    ("generate forgets what it said", "logits, states = model.step(chosen, states)",
     "logits, _ = model.step(chosen, states)"),
    ("a negative temperature is taken", "temperature < 0 or (top_k", "(top_k"),
    ("no number is a temperature", "math.isnan(temperature) or temperature", "temperature"),
    ("the coldest temperature overflows", "        if temperature < COLDEST:\n", "        if temperature == 0:\n"),
    ("numbers for bytes of a state", "return state.nbytes", "return state.numel()"),
    ("conv_attention is softmax twice", 'return ("short_conv", "attention" if',
     'return ("attention", "attention" if'),
    ("the paper's kernels have one head", "heads=12 if mixer in kernels.KERNELS else 1", "heads=1"),
    ("the paper's recall without dropout of weights", "        attention_dropout=0.1,\n", ""),
    ("the paper's Mamba has dropout", 'dropout=0.0 if mixer == "mamba" else 0.1',
     "dropout=0.1",
     "test_mamba_rwkv.py test_03_model.py"),
    ("the paper's softmax without biases", "        bias=True,\n", ""),
    ("the quotient of costs upside down", 'sizes["conv_attention", T] / sizes["rebased", T]',
     'sizes["rebased", T] / sizes["conv_attention", T]'),
])
FAULTS += of("rebased/few_places.py", "test_03_model.py test_04_train_mqar.py", [
    ("a query does not see itself", "(places <= positions.unsqueeze(-1))", "(places < positions.unsqueeze(-1))"),
    ("softmax without 1/√D", "scores = q @ k.mT / math.sqrt(q.shape[-1])", "scores = q @ k.mT"),
    ("a kernel's weights see the future", "attention.kernel.scores(q, k) * places_before(positions, x.shape[1])",
     "attention.kernel.scores(q, k)"),
    ("a kernel's weights are not divided", "return weights / (weights.sum(-1, keepdim=True) + EPS)",
     "return weights"),
    ("a kernel's weights without ε", "(weights.sum(-1, keepdim=True) + EPS)", "weights.sum(-1, keepdim=True)"),
    ("a kernel's weights under autocast", "with without_autocast(x.device):", "if True:"),
    ("a kernel's weights in half precision", "dtype = torch.promote_types(q.dtype, torch.float32)",
     "dtype = q.dtype"),
    ("no dropout of softmax's weights", "weights = F.dropout(weights, attention.dropout, attention.training)",
     "pass"),
    ("many places by their weights", "if positions.shape[1] > attention.kernel.num_features:", "if False:"),
    ("the second line sees the mixer only", "last.second_line(rows(x, positions) + y)", "last.second_line(y)"),
    ("the last layer is not normalised", "y = last.mixer.at(last.norm1(x), positions)",
     "y = last.mixer.at(x, positions)"),
    ("the weights of a layer that is not normalised", "last.mixer.weights(last.norm1(x), positions)",
     "last.mixer.weights(x, positions)"),
    ("positions are not checked", "    check_positions(positions, tokens)\n", ""),
])
FAULTS += of("04_train_mqar.py", "test_04_train_mqar.py", [
    ("the tests have the seed of the data", "run.vocab_size, power_a, seed=TEST_SEED",
     "run.vocab_size, power_a, seed=run.seed"),
    ("the tests begin among the seeds of runs", "TEST_SEED = 2**31\n", "TEST_SEED = 1000\n"),
    ("warm-up is ignored", "warmup = min(1, (step + 1) / (run.warmup + 1))", "warmup = 1"),
    ("warm-ups are exchanged", 'WARMUP = {"conv_attention": 100, "attention": 100}',
     'WARMUP = {"rebased": 100, "based": 100}'),
    ("no warm-up is planned", "warmup = WARMUP.get(mixer, 0)", "warmup = 0"),
    ("the schedule is a tenth of the run ahead", "math.cos(math.pi * step / run.steps)",
     "math.cos(math.pi * min(1, step / run.steps + 0.1))"),
    ("the cosine ends at half", "(1 + math.cos(math.pi * step / run.steps)) / 2",
     "(1 + math.cos(math.pi * step / run.steps / 2)) / 2"),
    ("rates are exchanged", '"rebased": 0.01, "based": 0.003}', '"rebased": 0.003, "based": 0.01}'),
    ("weight decay 0", "weight_decay=0.1, fused=True)\n    examples", "weight_decay=0.0, fused=True)\n    examples"),
    ("the schedule is not used", '        optimizer.param_groups[0]["lr"] = learning_rate(step, run)\n', ""),
    ("gradients add up", "    optimizer.zero_grad()\n", ""),
    ("the accuracy of random answers", "(logits.argmax(-1) == targets).float().mean()",
     "(logits.argmin(-1) == targets).float().mean()"),
    ("the loss of half of the queries", "loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())",
     "loss = F.cross_entropy(logits[:, ::2].flatten(0, 1), targets[:, ::2].flatten())"),
    ("every run has one start", "torch.manual_seed(run.seed)\n    config", "torch.manual_seed(0)\n    config"),
    ("every run has the same examples", "run.vocab_size, seed=run.seed)\n    positions",
     "run.vocab_size, seed=0)\n    positions"),
    ("each batch comes twice", "slice(step * run.batch, (step + 1) * run.batch)",
     "slice(step // 2 * run.batch, (step // 2 + 1) * run.batch)"),
    ("the model stays in training", "return recall_model.eval()", "return recall_model"),
    ("training has uniform queries", "run.vocab_size, seed=run.seed)\n    positions",
     "run.vocab_size, 1.0, seed=run.seed)\n    positions"),
    ("official and uniform are exchanged", '{"official": 0.01, "uniform": 1.0}',
     '{"official": 1.0, "uniform": 0.01}'),
    ("long tests have all examples", "run.test_examples if length < 8192 else max(1, run.test_examples // 4)",
     "run.test_examples"),
    ("the shares end in the middle of the pairs", "attention_shares(weights, tokens, positions, 2 * run.pairs)",
     "attention_shares(weights, tokens, positions, run.pairs)"),
    ("right and others are exchanged", "right, others, filler = attention_shares(weights, tokens, positions, 2",
     "others, right, filler = attention_shares(weights, tokens, positions, 2"),
    ("the filler is what others are", 'totals["filler"] += filler.sum().item()',
     'totals["filler"] += others.sum().item()'),
    ("a measure is not divided by the queries", "total / (examples * run.pairs)", "total / examples"),
    ("the right pair has two places", "(distance >= 0) & (distance <= 2)", "(distance >= 0) & (distance <= 1)"),
    ("the value is looked for before its key", "distance = torch.arange(tokens.shape[1]) - key_at",
     "distance = key_at - torch.arange(tokens.shape[1])"),
    ("filler behind the right pair counts twice", "in_pairs & ~right, filler & ~right)",
     "in_pairs & ~right, filler)"),
    ("filler inside the pairs", "filler = (~in_pairs & (tokens == 0)).unsqueeze(1)",
     "filler = (tokens != 0).unsqueeze(1)"),
    ("the floor is not set to 0", '        kernel.floor = 0.0\n        row["cells', '        row["cells'),
    ("the floor is also taken from what has none", "if kernel is not None and kernel.floor > 0:",
     "if kernel is not None:"),
    ("rows of other settings count as done", "all(row.get(name) == value for name, value in settings.items())",
     'all(row.get(name) == settings[name] for name in ("mixer", "seed"))'),
    ("rows come in another order", "return [found[run] for run in runs]", "return list(found.values())"),
    ("what is there is repeated", "missing = [run for run in runs if run not in found]", "missing = runs"),
    ("a seed twice is two runs", "for seed in dict.fromkeys(options.seeds):", "for seed in options.seeds:"),
    ("mixer by mixer", "runs.append(run)  # of train_mqar", "runs.insert(0, run)  # of train_mqar"),
    ("--steps is not heeded", "rate, options.steps, warmup, test_lengths", "rate, STEPS, warmup, test_lengths"),
    ("alarm clocks run at 1/p", "(clocks / rates).topk", "(clocks * rates).topk"),
    ("the last clocks to ring", "topk(count, largest=False)", "topk(count, largest=True)"),
    ("key 0, which is filler", "keys = 1 + draw_distinct", "keys = 0 + draw_distinct"),
    ("queries at odd places", "places = end + 2 * drawn", "places = end + 1 + 2 * drawn"),
    ("one slot less", "(seq_len - end) // 2 + 1, dtype", "(seq_len - end) // 2, dtype"),
    ("the power is a", "slots ** (power_a - 1)", "slots ** power_a"),
    ("labels are the keys", "scatter_(1, places, values)", "scatter_(1, places, keys)"),
    ("the row of Based without a floor goes under its name", 'lines.setdefault(f"{title}, floor 0", [])',
     "lines.setdefault(title, [])"),
    ("official read for uniform in a cell", 'return [cells[f"{length} {placement}"][measure] for cells in results]',
     'return [cells[f"{length} official"][measure] for cells in results]'),
    ("filler read for accuracy", "[measure] for cells in results]", '["filler"] for cells in results]'),
    ("every length drawn from the first", "spread(values_of(results, T, placement, measure)):>15",
     "spread(values_of(results, lengths[0], placement, measure)):>15"),
    ("the number of seeds is that of the first line", '{len(results):2}"', '{len(next(iter(lines.values()))):2}"'),
    ("the spread is that of all values", "stdev(values):.3f", "(max(values) - min(values)):.3f"),
    ("the sentence speaks of the shortest context", "T = max(lengths)\n    found = []\n"
     "    for title, results in lines.items():\n"
     "        found.append(f\"{title} {mean(values_of(results, T, 'uniform', 'accuracy')):.3f}\")\n"
     "    print",
     "T = min(lengths)\n    found = []\n"
     "    for title, results in lines.items():\n"
     "        found.append(f\"{title} {mean(values_of(results, T, 'uniform', 'accuracy')):.3f}\")\n"
     "    print"),
    ("who has learned is asked at the longest context", "at_first = values_of(results, min(lengths),",
     "at_first = values_of(results, max(lengths),"),
    ("a fall is read as a rise", "higher = sum(new > old for", "higher = sum(new < old for"),
    ("the sentence compares the wrong way round", "mean(after) > mean(before) + 0.1",
     "mean(before) > mean(after) - 0.1"),
    ("the share on filler after is that before", "filler_after = mean(values_of(changed,",
     "filler_after = mean(values_of(as_trained,"),
    ("the figure's panels are exchanged", "draw_panel(axis, lines, lengths, placement, measure)\n"
     "            axis",
     'draw_panel(axis, lines, lengths, "official", measure)\n'
     "            axis"),
    ("the figure shows accuracy twice", "draw_panel(axis, lines, lengths, placement, measure)\n"
     "            axis",
     'draw_panel(axis, lines, lengths, placement, "accuracy")\n'
     "            axis"),
    ("the figure's thin line ends at the mean", "highest = [max(values) for values in seeds]",
     "highest = [mean(values) for values in seeds]"),
    ("the figure's marks are the first seed", "means = [mean(values) for values in seeds]",
     "means = [values[0] for values in seeds]"),
    ("a name stands at the first mark", "ends.append((title, means[-1], color))",
     "ends.append((title, means[0], color))"),
])
FAULTS += of("05_train_pile.py", "test_05_train_pile.py", [
    ("bigrams are counted on validation", "common = common_bigrams(data.train)",
     "common = common_bigrams(data.valid)"),
    ("clipping is off", "clip_grad_norm_(model.parameters(), settings.clip)",
     "clip_grad_norm_(model.parameters(), math.inf)"),
    ("clipping to 1, whatever is set", "clip_grad_norm_(model.parameters(), settings.clip)",
     "clip_grad_norm_(model.parameters(), 1.0)"),
    ("β2 is .999", "betas=(0.9, 0.95)", "betas=(0.9, 0.999)"),
    ("β1 is .8", "betas=(0.9, 0.95)", "betas=(0.8, 0.95)"),
    ("vectors are decayed", '{"params": vectors, "weight_decay": 0.0}',
     '{"params": vectors, "weight_decay": settings.weight_decay}'),
    ("the decay is not the setting's", '{"params": matrices, "weight_decay": settings.weight_decay}',
     '{"params": matrices, "weight_decay": 0.1}'),
    ("the schedule is not used", '        group["lr"] = lr\n', "        pass\n"),
    ("only matrices follow the schedule", "    for group in optimizer.param_groups:\n",
     "    for group in optimizer.param_groups[:1]:\n"),
    ("gradients add up over steps", "    optimizer.zero_grad()\n", ""),
    ("the schedule has no warm-up", "if step < settings.warmup:", "if False:"),
    ("the cosine counts from 0", "progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)",
     "progress = step / settings.steps"),
    ("sequences overlap", "return T * ((a * i + b) % N) + c", "return T // 2 * ((a * i + b) % N) + c"),
    ("a has a common divisor with N", "while math.gcd(a, N) > 1:", "while False:"),
    ("every pass is cut at the same places", "c = int(random.integers(T))", "c = 0"),
    ("every pass begins at the same place", "np.random.default_rng([seed, epoch])", "np.random.default_rng([seed])"),
    ("the order does not depend on the seed", "np.random.default_rng([seed, epoch])",
     "np.random.default_rng([0, epoch])"),
    ("processes have the same part of a batch", "first = step * in_batch + rank * mine", "first = step * in_batch"),
    ("steps overlap", "first = step * in_batch + rank * mine", "first = step * mine + rank * mine"),
    ("micro-batches weigh alike", "(len(part) / sequences)", "(1 / len(parts))"),
    ("the loss is that of the last micro-batch", "total = total + loss.detach()", "total = loss.detach()"),
    ("targets are the inputs", "following = tokens[:, 1:]", "following = tokens[:, :-1]"),
    ("losses in half precision", "logits.to(torch.promote_types(logits.dtype, torch.float32))",
     "logits.to(torch.bfloat16)"),
    ("the weights do not depend on the seed", "torch.manual_seed(settings.seed)\n    return models",
     "torch.manual_seed(0)\n    return models"),
    ("a loss that is no number trains on", "if not torch.isfinite(loss + norm):", "if False:"),
    ("the log has the clipped norm", '"norm": norm.item()', '"norm": min(norm.item(), settings.clip)'),
    ("the optimiser's state is not kept", 'optimizer.load_state_dict(found["optimizer"])', "pass"),
    ("the weights are not put back", '    model.load_state_dict(found["model"])\n', ""),
    ("another run's checkpoint is taken", "    pile_run.refuse_another_run(path, found, mixer, settings, data)\n",
     ""),
    ("a run always begins anew", "if resume and path.exists():", "if False:"),
    ("a checkpoint is kept one step too late", "due = (step + 1) % settings.save_every == 0 or",
     "due = step % settings.save_every == 0 or"),
    ("the last step has no checkpoint", " or step + 1 == settings.steps\n", "\n"),
    ("the model stays in training", "return model.eval(), log", "return model, log"),
    ("a sample begins without a separator", "ids = [vocabulary.separator] + vocabulary.encode(prompt)[0].tolist()",
     "ids = [vocabulary.encode(prompt)[0].tolist()[0]] + vocabulary.encode(prompt)[0].tolist()"),
    ("a sample goes on after the end", "        if token.item() == vocabulary.separator:\n"
     "            break\n",
     ""),
    ("windows begin at every T", "begin += max(1, T // 2)", "begin += T"),
    ("windows begin at every token", "begin += max(1, T // 2)", "begin += 1"),
    ("a window scores what was scored", "yield begin, done", "yield begin, max(begin, done - 1)"),
    ("the token itself has occurred", "mask[np.unique(values, return_index=True)[1]] = False", "pass"),
    ("rare pairs are the common ones", "mask & ~np.isin(keys, common)", "mask & np.isin(keys, common)"),
    ("at least RARE times is common", "return keys[counts > RARE]", "return keys[counts >= RARE]"),
    ("pairs are counted in all of the text", "np.unique(bigram_keys(tokens[:COUNTED])",
     "np.unique(bigram_keys(tokens)"),
    ("a pair is its first token", "tokens[:-1] * 2**32 + tokens[1:]", "tokens[:-1] * 2**32"),
    ("pairs of large tokens collide", "tokens[:-1] * 2**32 + tokens[1:]", "tokens[:-1] * 2**8 + tokens[1:]"),
    ("a pair belongs to its first token", "return np.append(False, mask)", "return np.append(mask, False)"),
    ("masks of the tokens that are read", "recall_mask(window, name, common)[1:]",
     "recall_mask(window, name, common)[:-1]"),
    ("masks of the wrong end of a window", "masks[name][first : begin + T] = mask[new]",
     "masks[name][first : begin + T] = mask[: begin + T - first]"),
    ("bits per byte in nats", "losses.sum() / math.log(2) / max(1, num_bytes)", "losses.sum() / max(1, num_bytes)"),
    ("bits per byte by tokens", "losses.sum() / math.log(2) / max(1, num_bytes)", "losses.mean() / math.log(2)"),
    ("perplexity in bits", "math.exp(min(700.0, losses.mean()))", "2 ** min(700.0, losses.mean())"),
    ("the perplexity of nothing is 1", "        return None\n    return math.exp",
     "        return 1.0\n    return math.exp"),
    ("the position in training contexts", "length = settings.eval_length", "length = settings.seq_len"),
    ("all validation text is scored", "first_documents(data, settings.eval_tokens)", "first_documents(data, 10**12)"),
    ("scores in contexts of eval_length", "losses, masks = score(model, stream, settings.seq_len, common)",
     "losses, masks = score(model, stream, settings.eval_length, common)"),
    ("the laptop's softmax has the MLP of kernels", 'mlp = 235 if mixer == "attention" else 256', "mlp = 256"),
    ("the laptop's layers the other way round", 'layers = ("gated_conv", mixer) * 2',
     'layers = (mixer, "gated_conv") * 2'),
])
FAULTS += of("experiments/mqar.py", "test_experiments_mqar.py", [
    ("the schedule is an epoch ahead", "done = step // per_epoch / epochs if",
     "done = (step // per_epoch + 1) / epochs if"),
    ("the cosine of batches is an epoch ahead", "else step / (per_epoch * epochs)",
     "else min(1, step / (per_epoch * epochs) + 1 / epochs)"),
    ("warm-up is ignored", "* min(1, (step + 1) / (warmup + 1)) *", "*"),
    ("warm-ups are exchanged", "experiment.softmax_warmup if is_softmax(run.mixer) else experiment.warmup",
     "experiment.warmup if is_softmax(run.mixer) else experiment.softmax_warmup"),
    ("epochs are exchanged", "experiment.softmax_epochs if is_softmax(run.mixer) else experiment.epochs",
     "experiment.epochs if is_softmax(run.mixer) else experiment.softmax_epochs"),
    ("softmax above a convolution is a kernel", 'return mixer in ("attention", "conv_attention")',
     'return mixer == "attention"'),
    ("seeds of neighbouring epochs are shared", "return run.seed + SEEDS * epoch", "return run.seed + epoch"),
    ("tests have the seed of the first run", "vocab_size, power_a, TEST_SEED)\n    return",
     "vocab_size, power_a, 0)\n    return"),
    ("test rows are in the examples that do not change", "FIXED_SEED = TEST_SEED + 42", "FIXED_SEED = TEST_SEED"),
    ("weight decay 0", "weight_decay=0.1, fused=True", "weight_decay=0.0, fused=True"),
    ("accuracy with dropout on", "accuracy(trained.eval(), run, experiment)", "accuracy(trained, run, experiment)"),
    ("training with dropout off", "    trained.train()\n", ""),
    ("the last epoch for the best", '"accuracy": max(history["accuracies"])',
     '"accuracy": history["accuracies"][-1]'),
    ("rows of other settings count as done",
     'if row.get("settings") == settings(experiment) and row.get("role") == role:',
     'if row.get("role") == role:'),
    ("searched rows count as reported", 'if row.get("settings") == settings(experiment) and row.get("role") == role:',
     'if row.get("settings") == settings(experiment):'),
    ("the shares end in the middle of the pairs", "attention_shares(weights, tokens, at, 2 * run.pairs)).sum",
     "attention_shares(weights, tokens, at, run.pairs)).sum"),
    ("the overlap ends in the middle of the pairs", "overlap(weights, tokens, at, 2 * run.pairs)",
     "overlap(weights, tokens, at, run.pairs)"),
    ("the first head for the mean", "logits, weights = found[0], found[1].mean(1).cpu()",
     "logits, weights = found[0], found[1][:, 0].cpu()"),
    ("right and others are exchanged", 'zip(("right", "others", "filler"), shares',
     'zip(("others", "right", "filler"), shares'),
    ("attended is what has a quarter of the largest", "weights.amax(-1, keepdim=True) / 2",
     "weights.amax(-1, keepdim=True) / 4"),
    ("the optimiser's state is not kept", '        optimizer.load_state_dict(saved["optimizer"])\n', ""),
    ("a run that goes on has a new history", '        history = saved["history"]\n', ""),
    ("a run that is good enough goes on", 'history["accuracies"][-1] > experiment.stop_at or ', ""),
    ("a diverged run goes on", ' or math.isnan(history["losses"][-1])', ""),
    ("dropout goes on where it was", "        torch.manual_seed(epoch_seed(run, epoch))  #", "        #"),
    ("every run has one start", "torch.manual_seed(run.seed)\n    trained", "torch.manual_seed(0)\n    trained"),
    ("the loss of an epoch is its last", "torch.stack(losses[-20:]).mean().item()", "losses[-1].item()"),
    ("an epoch of fresh examples in the old order", "generator=torch.Generator().manual_seed(seed))\n    for at",
     "generator=torch.Generator().manual_seed(0))\n    for at"),
    ("the first batch, again and again", "[: steps_per_epoch(experiment)]:\n"
     "        yield inputs[at], labels[at]",
     "[: steps_per_epoch(experiment)]:\n"
     "        yield inputs[: len(at)], labels[: len(at)]"),
    ("the spread of γ is divided by n − 1", "values.std(correction=0)", "values.std()"),
    ("γ is looked at in the first layer",
     'return getattr(getattr(trained.blocks[-1], "mixer", None), "kernel", None)',
     'return getattr(getattr(trained.blocks[0], "mixer", None), "kernel", None)'),
    ("the rate of a whole grid where one was chosen", "rates = (chosen[cell],) if chosen else", "rates ="),
    ("seed by seed, but cells backwards", "for cell in sweep.shard(cells, part):",
     "for cell in sweep.shard(cells[::-1], part):"),
    ("kernels of the paper have one head", "experiment.heads or (12 if", "experiment.heads or (1 if"),
    ("dropout where the paper has none", "dropout = min(config.dropout, experiment.dropout)",
     "dropout = experiment.dropout"),
    ("no dropout of softmax's weights", "attention_dropout=experiment.dropout,", "attention_dropout=0.0,"),
    ("long tests have all examples",
     "max(1, experiment.test_examples // 4) if length >= 8192 else experiment.test_examples",
     "experiment.test_examples"),
    ("accuracy is not divided by the queries", "return right / positions.numel()\n\n\n@torch",
     "return right / len(positions)\n\n\n@torch"),
    ("the picture frames the key", ".double().argmax(-1) + 1  #", ".double().argmax(-1)  #"),
    ("the seconds of both forms are exchanged", '"chunked_seconds": middle - start,',
     '"chunked_seconds": end - middle,'),
    ("a cell says official and is uniform", 'cells[f"{length} {placement}"] = test(trained, length, power_a,',
     'cells[f"{length} {placement}"] = test(trained, length, 1.0,'),
    ("a checkpoint is that of every role", 'f"{role} {run} {json', 'f"{run} {json'),
    ("a checkpoint is that of all settings", ' {json.dumps(settings(experiment))}")', '")'),
    ("rates are chosen by the worst", "chosen = mqar_report.best_rates(searched)",
     "chosen = {cell: min(rates, key=rates.get) for cell, rates in mqar_report.scores_by_rate(searched).items()}"),
    ("a finished run keeps its checkpoint",
     "            sweep.remove_checkpoint(checkpoint_of(run, experiment, role, path))\n",
     ""),
    ("seeds of a search may be reported", "if set(experiment.seeds) & set(experiment.search_seeds):", "if False:"),
    ("two epochs share examples", ">= EPOCHS:", ">= 2 * EPOCHS:"),
    ("two runs share examples", "if value >= SEEDS:", "if value >= 2 * SEEDS:"),
    ("an epoch without a batch", "if experiment.batch > experiment.examples:", "if False:"),
])
FAULTS += of("experiments/mqar_report.py", "test_experiments_report.py test_readme.py", [
    ("official read for uniform in the table", "column(own, f'{T} {placement}', measure)",
     "column(own, f'{T} official', measure)"),
    ("official read for uniform in the figure", 'train_mqar.draw_panel(axis, lines, lengths, "uniform", measure)',
     'train_mqar.draw_panel(axis, lines, lengths, "official", measure)'),
    ("official read for uniform in the sentence", 'values = column(own, f"{T} uniform", "accuracy")',
     'values = column(own, f"{T} official", "accuracy")'),
    ("official read for uniform between floors", "column(cells[mixer], f'{T} uniform', measure)",
     "column(cells[mixer], f'{T} official', measure)"),
    ("right and other pairs are exchanged", "{means['accuracy']:10.3f}{means['right']:12.3f}\"",
     "{means['accuracy']:10.3f}{means['others']:12.3f}\""),
    ("other pairs and filler are exchanged", "{means['others']:12.3f}{means['filler']:9.3f}",
     "{means['filler']:12.3f}{means['others']:9.3f}"),
    ("the soft IoU over the right weight alone", "means['right'] / (2 - means['right'])",
     "means['right'] / (1 + means['right'])"),
    ("decay without the schedule", '0.1 * row["learning_rate"] * warmup * schedule',
     '0.1 * row["learning_rate"] * warmup'),
    ("every width drawn from the first cell",
     "own.setdefault(title(mixer), {})[d] = [best_accuracy(row) for row in cells[mixer, T, K, d]]",
     "own.setdefault(title(mixer), {})[d] = [best_accuracy(row) for row in cells[mixer, T, K, widths[0]]]"),
    ("the paper's values at the first width", "theirs.setdefault(title(mixer), {})[d] = [published(mixer, T, K, d)]",
     "theirs.setdefault(title(mixer), {})[d] = [published(mixer, T, K, widths[0])]"),
    ("the sentence's comparison is reversed",
     'if max(means["based"], means["rebased_floor"]) < min(means["rebased"], means["based_no_floor"]):',
     'if max(means["based"], means["rebased_floor"]) > min(means["rebased"], means["based_no_floor"]):'),
    ("the sentence compares means of best and worst",
     'if max(means["based"], means["rebased_floor"]) < min(means["rebased"], means["based_no_floor"]):',
     'if min(means["based"], means["rebased_floor"]) < max(means["rebased"], means["based_no_floor"]):'),
    ("a table of accuracy twice", 'for measure, name in (("accuracy", ""), ("filler", ", on filler")):',
     'for measure, name in (("accuracy", ""), ("accuracy", ", on filler")):'),
    ("every length from the shortest", "for T in lengths:\n                    entries +=",
     "for T in lengths[:1] * len(lengths):\n"
     "                    entries +="),
    ("the spread is divided by n", "/ max(1, len(values) - 1))", "/ len(values))"),
    ("the rate is the worst", "{cell: max(rates, key=rates.get) for cell, rates in",
     "{cell: min(rates, key=rates.get) for cell, rates in"),
    ("the rate is chosen on reported seeds", 'if row["role"] == "search" or cell_of(row) not in searched:',
     'if row["role"] == "report" or cell_of(row) not in searched:'),
    ("searched seeds are reported", 'if row["role"] == "report" and row["learning_rate"] ==',
     'if row["learning_rate"] =='),
    ("all rates are reported", 'if row["role"] == "report" and row["learning_rate"] == best[cell_of(row)]:',
     'if row["role"] == "report":'),
    ("a rate is chosen at the trained length", 'if len(row["cells"]) > 1:\n        return fmean',
     "if False:\n        return fmean"),
    ("the best epoch is the last", 'return row["accuracy"] if "accuracy" in row else',
     'return row["accuracies"][-1] if "accuracies" in row else'),
    ("a cell without its pairs", 'return row["mixer"], row["length"], row["pairs"], row["d_model"]',
     'return row["mixer"], row["length"], 16, row["d_model"]'),
    ("rows of two settings are one", "settings = {name: row.get(name) for name in names}", "settings = {}"),
    ("two seeds are one row", 'row["learning_rate"], row["seed"], row["role"], json',
     'row["learning_rate"], row["role"], json'),
    ("the first width of the paper for all", "return values[widths.index(d)]", "return values[0]"),
    ("Figure 1 at Table 1's widths", "((FIGURE_1, (64, 128, 256, 512)), (TABLE_1, (16, 24, 32, 48)))",
     "((FIGURE_1, (64, 128, 256, 512)), (TABLE_1, (24, 16, 32, 48)))"),
    ("the grid shows the search's seeds", 'return f"{mean:.3f} ± {std:.3f} ({len(own)}){beside}"',
     'return f"{mean:.3f} ± {std:.3f} ({len(own) + 2}){beside}"'),
    ("the grid shows spread for mean", 'return f"{mean:.3f} ± {std:.3f} ({len(own)}){beside}"',
     'return f"{std:.3f} ± {mean:.3f} ({len(own)}){beside}"'),
    ("the chosen rate's mark on the worst", "best = max(values, key=values.get)\n        marks",
     "best = min(values, key=values.get)\n        marks"),
    ("who is behind is said to lead", 'if mean > means["rebased"] + 0.005]', 'if mean < means["rebased"] - 0.005]'),
    ("who is level is said to be behind", 'if means[mixer] >= means["rebased"] - 0.005]',
     'if means[mixer] > means["rebased"] + 0.005]'),
    ("the grid's thin line ends at the mean", "highest = [max(values) for values in seeds.values()]",
     "highest = [mean_std(values)[0] for values in seeds.values()]"),
    ("the grid's marks are the first seed", "means = [mean_std(values)[0] for values in seeds.values()]",
     "means = [values[0] for values in seeds.values()]"),
    ("with a floor and without are exchanged",
     "pairs = [(without_floor(mixer), mixer) for mixer in cells if has_floor",
     "pairs = [(mixer, without_floor(mixer)) for mixer in cells if has_floor"),
    ("between floors: accuracy in every column",
     "{' | '.join(spread(column(cells[mixer], f'{T} uniform', measure)) for mixer in pair):^33}",
     "{' | '.join(spread(column(cells[mixer], f'{T} uniform', 'accuracy')) for mixer in pair):^33}"),
    ("the floor costs if one seed lies below", "separate = max(with_floor) < min(without)",
     "separate = min(with_floor) < max(without)"),
    ("the floor costs where it helps", "separate = max(with_floor) < min(without)",
     "separate = min(with_floor) > max(without)"),
    ("every kernel has learned",
     'if all(mean_std(column(cells[mixer], trained, "accuracy"))[0] > LEARNED for mixer in pair):',
     "if True:"),
    ("learned is asked of one of two", "if all(mean_std(column(cells[mixer], trained,",
     "if any(mean_std(column(cells[mixer], trained,"),
    ("at the shortest context",
     "cells, T = {mixer: own for (mixer, *_), own in reported(rows).items()}, max(tested_lengths(rows))",
     "cells, T = {mixer: own for (mixer, *_), own in reported(rows).items()}, min(tested_lengths(rows))"),
    ("the sentence at the shortest context", "T, cells = max(tested_lengths(rows)), reported(rows)",
     "T, cells = min(tested_lengths(rows)), reported(rows)"),
    ("chunked and quadratic are exchanged",
     'chunked, quadratic = cost["chunked_seconds"] * 1e3, cost["quadratic_seconds"] * 1e3',
     'quadratic, chunked = cost["chunked_seconds"] * 1e3, cost["quadratic_seconds"] * 1e3'),
    ("the IoU of another cell beside ours", "if mixer in IOU and (T, K) == IOU_CELL else", "if mixer in IOU else"),
    ("shares of uniform queries at the trained length", 'column(own, f"{T} official", measure))\n        beside',
     'column(own, f"{T} uniform", measure))\n        beside'),
    ("γ before training", 'ends = [row["placed"][name][-1] for row in own if',
     'ends = [row["placed"][name][0] for row in own if'),
    ("γ of the first seed", "mean, std = (fmean(values) for values in zip(*ends, strict=True))",
     "mean, std = ends[0]"),
    ("γ's spread for its mean", 'entry = f"{mean:.3f} ± {std:.3f}"', 'entry = f"{std:.3f} ± {mean:.3f}"'),
    ("γ's figure: the line is the spread", 'means, stds = zip(*row["placed"][name], strict=True)',
     'stds, means = zip(*row["placed"][name], strict=True)'),
    ("γ's figure: the names exchanged", "for (name, label), (color, dashes, _) in zip(PLACED.items(), train_mqar",
     "for (name, label), (color, dashes, _) in zip(zip(PLACED, [*PLACED.values()][::-1]), train_mqar"),
    ("the picture: queries unsorted",
     'by_place = sorted(zip(row["picture"]["right"], row["picture"]["weights"], strict=True))',
     'by_place = list(zip(row["picture"]["right"], row["picture"]["weights"], strict=True))'),
    ("the picture: frames one place further",
     "frame_x = [right - 1.5, right + 1.5, right + 1.5, right - 1.5, right - 1.5]",
     "frame_x = [right - 0.5, right + 2.5, right + 2.5, right - 0.5, right - 0.5]"),
    ("the picture: half of the pairs", 'pairs_end = 2 * row["pairs"]', 'pairs_end = row["pairs"]'),
    ("the picture: the share of the pairs for what is beyond", "beyond = 1 - sum(map(sum, weights)) / len(weights)",
     "beyond = sum(map(sum, weights)) / len(weights)"),
    ("floor := 0 has the cells of the trained floor", '"cells": row["cells_without_floor"], "placed"',
     '"cells": row["cells"], "placed"'),
    ("the figure of up to seven lines: the first seed", 'lines = {title(mixer): [row["cells"] for row in own] for',
     'lines = {title(mixer): [row["cells"] for row in own[:1]] for'),
    ("panels of a kernel without its floor", 'lines[title(mixer)] = [row["cells"] for row in cells[mixer]]',
     'lines[title(mixer)] = [row["cells"] for row in cells[families[kernel][0]]]'),
    ("panels: titles of the other measure", 'axis.set_title(f"{title(kernel)}: {train_mqar.MEASURES[measure]}"',
     "axis.set_title(f\"{title(kernel)}: {train_mqar.MEASURES['accuracy']}\""),
    ("softmax's rate at the head of all rows", "{own[0]['learning_rate']:6g}{len(own):3}",
     "{rows[0]['learning_rate']:6g}{len(own):3}"),
    ("mixed settings go unsaid", "if len({identity(row)[-1] for row in own}) > 1:", "if False:"),
    ("a title of another kernel", '"x2": "x²",\n    "norm": "norm(x)²",', '"x2": "norm(x)²",\n    "norm": "x²",'),
])
FAULTS += of("rebased/pile_report.py", "test_05_train_pile.py test_experiments_pile.py", [
    ("`other` over all tokens", '"other": perplexity(losses[~mask])', '"other": perplexity(losses)'),
    ("recall and other are exchanged", '"recall": perplexity(losses[mask]),', '"recall": perplexity(losses[~mask]),'),
    ("the share of the others", '"share": float(mask.mean()),', '"share": float((~mask).mean()),'),
    ("bits per byte by tokens", "bits = bits_per_byte(losses[is_text], num_bytes)",
     "bits = bits_per_byte(losses[is_text], int(is_text.sum()))"),
    ("the ends of documents are bytes", "bits = bits_per_byte(losses[is_text], num_bytes)",
     'bits = bits_per_byte(losses, num_bytes) if name == "all" else bits_per_byte(losses[is_text], num_bytes)'),
    ("the loss is that of the last subset", 'numbers["loss"] = float(losses.mean())',
     'numbers["loss"] = float(losses[is_text].mean())'),
    ("the curve gives the last loss of each part", "curve.append([end * batch_tokens, sum(losses) / every])",
     "curve.append([end * batch_tokens, losses[-1]])"),
    ("the curve counts steps", "curve.append([end * batch_tokens, sum(losses) / every])",
     "curve.append([end, sum(losses) / every])"),
    ("the speed is that of the last step", 'median(record["tokens_per_s"] for record in log)',
     'log[-1]["tokens_per_s"]'),
    ("positions: the last context only", "total += losses_of(", "total = losses_of("),
    ("positions: contexts overlap", "range(0, len(stream) - length, length)",
     "range(0, len(stream) - length, max(1, length // 2))"),
    ("positions: means over all before", "parts = np.split(total / contexts, ends[:-1])",
     "parts = [(total / contexts)[:end] for end in ends]"),
    ("a table: the share of AR tokens for the others", '("other", 1 - first["share"])', '("other", first["share"])'),
    ("a table: every model has the first one's slices", "number(row['slices'][name][part], '.2f')",
     "number(rows[0]['slices'][name][part], '.2f')"),
    ("a table: every model has the first one's bits", 'cell = row["subsets"][name]\n',
     'cell = rows[0]["subsets"][name]\n'),
    ("a table: the subset's bytes are those of all", "{first['bytes']:12,}{first['zlib']:9.3f}{cells}",
     "{rows[0]['bytes']:12,}{first['zlib']:9.3f}{cells}"),
    ("a table: loss and perplexity are exchanged", "{row['loss']:8.3f}{row['perplexity']:12.2f}",
     "{row['perplexity']:8.3f}{row['loss']:12.2f}"),
    ("> below zlib", '">" if cell["bits_per_byte"] > cell["zlib"]', '">" if cell["bits_per_byte"] < cell["zlib"]'),
    ("the reading: the best is the worst", "best = ordered[0]", "best = ordered[-1]"),
    ("the reading: recall and other are exchanged", 'recall = number(bigram["recall"], ".2f")',
     'recall = number(bigram["other"], ".2f")'),
    ("the reading: tokens are steps", 'tokens = best["settings"]["steps"] * best["settings"]["batch_tokens"]',
     'tokens = best["settings"]["steps"]'),
    ("the figure: training curves twice", 'draw_lines(below, rows, "by_position")',
     'draw_lines(below, rows, "curve")'),
    ("the figure: every line is the first model's", "axis.plot([x for x, _ in row[key]], [y for _, y in row[key]]",
     "axis.plot([x for x, _ in rows[0][key]], [y for _, y in rows[0][key]]"),
    ("the figure: a name at the wrong end", 'ends.append((row["mixer"], row[key][-1][1], color))',
     'ends.append((row["mixer"], row[key][0][1], color))'),
    ("the figure: the trained length is that of evaluation", "below.axvline(length, color",
     "below.axvline(ends[-1], color"),
])
FAULTS += of("rebased/chunked_cpu.py", "test_chunked_cpu.py test_02_linear_attention.py", [
    ("ε is not added", "torch.add(num[..., room.Dv :], EPS, out=inverse_g).reciprocal_()",
     "torch.add(num[..., room.Dv :], 0, out=inverse_g).reciprocal_()"),
    ("the square is not completed right", "c1 / (2 * math.sqrt(c2))", "c1 / math.sqrt(c2)"),
    ("the floor is c0", "c0 - c1 * c1 / (4 * c2), True)", "c0, True)"),
    ("the floor lies also on the future", "u.add_(weight.floor).tril_()", "u.add_(weight.floor)"),
    ("a key sees itself alone", "    return out.tril_()\n", "    return out.tril_(-1)\n"),
    ("x_a·x_a counts twice", "        products[:, 0].mul_(self.square)  # ... but", "        # ... but"),
    ("x_a·x_a counts twice on the way back", "        g[:, 0].mul_(self.square)\n", ""),
    ("only one factor has a gradient", "        dx.baddbmm_(self.back, g.flatten(1, 2))\n", ""),
    ("the linear features have no gradient", "            dx += linear\n", ""),
    ("states in the order of rotations come out", "    S = reorder(S, coefficients, D, inwards=False).unflatten",
     "    S = S.unflatten"),
    ("an initial state is taken in another order",
     "S = reorder(join_state(S, z).to(q.dtype), coefficients, D, inwards=True)",
     "S = join_state(S, z).to(q.dtype)"),
    ("a state of another precision is not taken", "join_state(S, z).to(q.dtype)", "join_state(S, z)"),
    ("the forward pass runs under autocast", "with without_autocast(q.device):\n", "if True:\n"),
    ("the backward pass runs under autocast", "with without_autocast(q.device):  # backward()",
     "if True:  # backward()"),
    ("the state is written over", "S[heads].clone()", "S[heads]"),
    ("the gradient of the final state is written over", "d_final[heads].clone()", "d_final[heads]"),
    ("δ is forgotten", "torch.sum(products, -1, out=room.d1[..., room.Dv]).neg_()", "room.d1[..., room.Dv].zero_()"),
    ("du of features sees the future", "        du = dw.tril_()\n", "        du = dw\n"),
    ("du without its 2", "scale = 2 * weight.scale", "scale = weight.scale"),
    ("dv has no later chunks", "            room.dv1[g].baddbmm_(phi_k[g].mT, R)\n", ""),
    ("dk has no later chunks", "            dk += room.phi_k.pull_back(room.gradient)\n",
     "            room.phi_k.pull_back(room.gradient)\n"),
    ("dq has no earlier chunks", "            dq += room.phi_q.pull_back(room.gradient)\n",
     "            room.phi_q.pull_back(room.gradient)\n"),
    ("R is that of the last chunk", "R = add_product(R, phi_q[g], room.d1[g])",
     "R = add_product(None, phi_q[g], room.d1[g])"),
    ("the last chunk does not join", "if join_last or g < len(num) - 1:", "if g < len(num) - 1:"),
    ("what stands behind the chunks is left out", "    if T > in_chunks:\n", "    if T > in_chunks and C == 1:\n"),
    ("a second derivative is not refused",
     "found = first_order_only(compute, (do, d_final, *ctx.saved_tensors), instead=INSTEAD)",
     "found = compute(do, d_final, *ctx.saved_tensors)"),
    ("the most costly chunk is taken", "return min(candidates, key=lambda C:",
     "return max(candidates, key=lambda C:"),
    ("features are kept without need", "if any(ctx.needs_input_grad) and (chunks > 1 or S is not None):",
     "if chunks > 1 or S is not None:"),
])
FAULTS += of("rebased/triton_kernels.py", "test_triton_kernels.py", [
    ("what rounding took from o is not added back",
     "    o_tile += tl.load(rounding_error + i * DV + e, mask=row_mask, other=0.0).to(tl.float32)\n",
     ""),
    ("the scan's total is not carried past 16 slots", "        total += tl.sum(x, 0)\n", ""),
    ("the scan keeps the last total only", "        total += tl.sum(x, 0)\n", "        total = tl.sum(x, 0)\n"),
    ("tf32 for float32", '"ieee" if dtype == torch.float32 else "tf32"', '"tf32"'),
    ("float32 in bfloat16", '"DTYPE": tl.bfloat16 if is_bfloat16 else tl.float32', '"DTYPE": tl.bfloat16'),
    ("a query does not see itself", "            w = tl.where(i >= j[None, :], w, 0.0)\n"
     "        w = w.to(DTYPE)",
     "            w = tl.where(i > j[None, :], w, 0.0)\n"
     "        w = w.to(DTYPE)"),
    ("no floor inside a segment", "        w = u * u + floor  # [TILE, STEP]", "        w = u * u  # [TILE, STEP]"),
    ("no floor on the way back", "        w_inv = u * u_inv + floor * inv\n", "        w_inv = u * u_inv\n"),
    ("ε is not added", "inv = 1 / (den + EPS_ON_CHIP)", "inv = 1 / den"),
    ("the normaliser forgets the past",
     "            den += tl.sum(phi.to(tl.float32) * z[None, :], 1, keep_dims=True)\n",
     ""),
    ("the constant feature beyond T", "            y_column = (t < T).to(tl.float32)\n",
     "            y_column = tl.full((STEP, 1), 1.0, tl.float32)\n"),
    ("segments in the mirror are not counted from the end", "        segment = tl.cdiv(T, SEGMENT) - 1 - turn\n",
     "        segment = turn\n"),
    ("δ is forgotten", "dw_den = tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION) - delta_tile\n",
     "dw_den = tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION)\n"),
    ("r is forgotten", "(tl.dot(v_tile, tl.trans(R), input_precision=PRECISION) + r[None, :]) * root",
     "tl.dot(v_tile, tl.trans(R), input_precision=PRECISION) * root"),
    ("dq without its 2 · scale", "    dq_tile *= 2 * scale\n", "    dq_tile *= scale\n"),
    ("only one factor has a gradient of q",
     "            dq_tile = tl.dot(dxb, tl.trans(B), dq_tile, input_precision=PRECISION)\n",
     ""),
    ("the table: a pair counts once", "times = once if a == b else 2", "times = once"),
    ("the final state is the first", "final.copy_(states[:, -1])", "final.copy_(states[:, 0])"),
    ("a gradient of the initial state where none was", "    if not ctx.had_initial:\n        d_initial = None\n",
     ""),
    ("cards of any age", "    if major < 8:\n", "    if major < 0:\n"),
    ("half a state is taken", "    if S is None or z is None:\n"
     '        raise ValueError("S and z are one state: give both or neither")\n',
     "    if S is None or z is None:\n        return\n"),
])
FAULTS += of("rebased/mamba.py", "test_mamba_rwkv.py", [
    ("the scan runs under autocast", "with without_autocast(u.device):", "if True:"),
    ("a state in half precision", "dtype = torch.promote_types(u.dtype, torch.float32)", "dtype = u.dtype"),
    ("the skip is left out", "torch.addcmul(y, u, self.skip)", "y"),
    ("the gate is a sigmoid", "F.silu(self.gate(x))\n        y = self.out",
     "torch.sigmoid(self.gate(x))\n        y = self.out"),
    ("the convolution's bias is left out", "    y = conv.bias\n", "    y = 0 * conv.bias\n"),
    ("a block does not begin where the last one ended", "                state = H[-1].clone()\n",
     "                state = H[0].clone()\n"),
    ("later blocks have no gradient", "        later = dlast[some]  #", "        later = 0 * dlast[some]  #"),
    ("dA is that of the last block", "            dA += dA_of_block\n", "            dA = dA_of_block\n"),
    ("Δ starts as PyTorch draws it", "self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))",
     "self.dt_bias = nn.Parameter(dt)"),
    ("A starts at −1 everywhere", "torch.arange(1.0, self.N + 1).log()", "torch.ones(self.N).log()"),
    ("the state is a view of all rows", "return y, x[T:].clone()", "return y, x[T:]"),
    ("the block has no norm", "return x + self.mixer(self.norm1(x), state)\n", "return x + self.mixer(x, state)\n"),
    ("a block's eps is 1e-3", "nn.RMSNorm(config.d_model, eps=1e-5)", "nn.RMSNorm(config.d_model, eps=1e-3)"),
    ("a second derivative is not refused",
     'return first_order_only(gradients, (dy, dlast, *ctx.saved_tensors), instead="mamba_loop of rebased/mamba.py")',
     "return gradients(dy, dlast, *ctx.saved_tensors)"),
])
FAULTS += of("rebased/rwkv.py", "test_mamba_rwkv.py", [
    ("the running maximum does not fade", "        running_max(2 * w, odd)\n", "        running_max(w, odd)\n"),
    ("a token's own weight is an old one's", "new = torch.exp(first + k - largest)", "new = torch.exp(k - largest)"),
    ("the largest exponent leaves out the new token", "largest = torch.maximum(m[:-1], first + k)",
     "largest = torch.maximum(m[:-1], k)"),
    ("values are mixed as keys", "v = self.value(torch.lerp(before, x, self.mix_v))",
     "v = self.value(torch.lerp(before, x, self.mix_k))"),
    ("the mixture the other way round", "r = self.receptance(torch.lerp(before, x, self.mix_r))",
     "r = self.receptance(torch.lerp(x, before, self.mix_r))"),
    ("silu of the receptance", "torch.sigmoid(r) * y).transpose(0, 1)",
     "torch.nn.functional.silu(r) * y).transpose(0, 1)"),
    ("the state forgets the last token", "return y, (x[-1].clone(), h", "return y, (last.clone(), h"),
    ("every layer starts as the lowest", "depth = layer / max(1, layers - 1)", "depth = 0.0"),
    ("the block's second line without its residual", "return x + self.norm2(x)\n        y, state",
     "return self.norm2(x)\n        y, state"),
])
FAULTS += of("rebased/scan.py", "test_mamba_rwkv.py", [
    ("even rows are left out", "        h[2::2].addcmul_(a[1::2], h[1:T:2])\n", "        pass\n"),
    ("two steps are one", "two_steps = a[1 : T - 1 : 2] * a[2::2]", "two_steps = a[2::2]"),
    ("even rows are left out on the way back",
     "        even.addcmul_(a[1 - first : T - 1 : 2], g[2 - first : T : 2])\n",
     "        pass\n"),
    ("the gradient is written over", "    G = dH.clone()\n", "    G = dH\n"),
])
FAULTS += of("rebased/autograd.py", "test_autograd.py", [
    ("second derivatives are silently 0", "return FirstOrderOnly.apply(compute, instead, *tensors)",
     "return compute(*tensors)"),
    ("the error names nothing", 'f"gradient, use {ctx.instead}"', '"gradient, use another form"'),
])
FAULTS += of("rebased/tokens.py", "test_pile_data.py test_05_train_pile.py", [
    ("a split by Python's hash",
     'int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") < share * 2**64',
     "hash(text) % 2**32 < share * 2**32"),
    ("a split by place", 'int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") < share * 2**64',
     "len(text) % 100 < share * 100"),
    ("zlib in bytes", "return 8 * len(zlib.compress(", "return len(zlib.compress("),
    ("zlib by tokens", "9)) / num_bytes if num_bytes else None",
     "9)) / int(rows[:, 1].sum()) if num_bytes else None"),
    ("zlib at its fastest", '.encode("utf-8"), 9)) / num_bytes', '.encode("utf-8"), 1)) / num_bytes'),
    ("BPE: bytes are characters", 'len(text.encode("utf-8")), 0', "len(text), 0"),
    ("BPE: bytes are tokens", 'return np.array(self.to_ids(text), dtype=np.int64), len(text.encode("utf-8")), 0',
     "ids = np.array(self.to_ids(text), dtype=np.int64)\n"
     "        return ids, len(ids), 0"),
    ("BPE: V is not rounded up", "self.size = -(-size // 8) * 8", "self.size = size"),
    ("zero bytes are not counted", "return kept, len(kept), len(ids) - len(kept)", "return kept, len(kept), 0"),
    ("zero bytes end a document", "kept = ids[ids != 0]", "kept = ids"),
    ("tokens of 2^16 do not fit", "np.uint16 if vocab_size <= 2**16 else np.uint32", "np.uint16"),
    ("no separator behind a document", "np.append(ids, vocabulary.separator).astype",
     "np.append(ids, ids[:1]).astype"),
    ("a document begins at its bytes", 'parts[f"{split}.bin"].tell() // dtype.itemsize',
     'parts[f"{split}.bin"].tell()'),
    ("subsets are one", 'manifest["names"].index(subset)], dtype', "0], dtype"),
    ("what a kill left is not cut off", '            file.truncate(manifest["sizes"][name])\n', ""),
    ("the manifest does not say how far it is", 'manifest | {"at": place, "problems"', 'manifest | {"problems"'),
    ("the ends of documents are text", "    is_text[docs[:, 0] + docs[:, 1]] = False\n", ""),
    ("all of zlib is that of the last subset", "        compressed += bits * num_bytes\n",
     "        compressed = bits * num_bytes\n"),
    ("a subset is all text", "is_text & (subset == i), num_bytes, bits", "is_text, num_bytes, bits"),
    ("the first document only", "docs = docs[: max(1, np.searchsorted(docs[:, 0], limit))]", "docs = docs[:1]"),
    ("a text begins without a separator", "np.append([data.vocabulary.separator], data.valid[:end]), docs",
     "np.append(data.valid[:1], data.valid[:end]), docs"),
    ("tokens of another tokenizer are taken", '"tokenizer": identity(vocabulary), "valid',
     '"tokenizer": vocabulary.name, "valid'),
    ("tokens of another split are taken", '"valid share": valid_share, "sources"',
     '"valid share": 0.2, "sources"',
     "test_pile_data.py"),
    ("a file is known by its size", "return [[path.stat().st_size, known[stamp(path)]] for path in files]",
     'return [[path.stat().st_size, ""] for path in files]'),
    ("a changed file has its old digest",
     'return f"{os.path.realpath(path)}:{about.st_size}:{about.st_mtime_ns}:{about.st_ctime_ns}"',
     'return f"{os.path.realpath(path)}:{about.st_size}"'),
    ("another program's tokens are taken over", "        if (folder / name).exists():\n"
     "            raise Refusal",
     "        if False:\n            raise Refusal"),
    ("the table counts training twice", "{valid['documents']:12,}{valid['bytes']:12,}",
     "{train['documents']:12,}{train['bytes']:12,}"),
    ("the table's bytes a token of training documents", 'rate = (train["bytes"] + valid["bytes"]) /',
     'rate = (train["documents"] + valid["documents"]) /'),
])
FAULTS += of("rebased/pile_data.py", "test_pile_data.py", [
    ("folders that are links are passed over", "followlinks=True", "followlinks=False"),
    ("upper-case names are passed over", "return path.name.lower().endswith(SUFFIXES)",
     "return path.name.endswith(SUFFIXES)"),
    ("validation files are trained on", "elif NOT_FOR_TRAINING.fullmatch(path.name):", "elif False:"),
    ("a file named twice is read twice", "files.setdefault(os.path.realpath(file), file)",
     "files.setdefault(len(files), file)"),
    ("files in the order of the disk", "    found.sort()\n", "    found.reverse()\n"),
    ("the first frame only", "            rest = frame.unused_data  # the beginning of the next frame\n"
     "            frame = None\n",
     "            return\n"),
    ("an end in the middle goes unsaid", "    if frame:\n        raise Damaged",
     "    if False:\n        raise Damaged"),
    ("a long line is held", "        if size > LONGEST_LINE:\n            parts = []\n",
     ""),
    ("a line over the limit is a line", 'return b"".join([*parts, last]) if size <= LONGEST_LINE else None',
     'return b"".join([*parts, last])'),
    ("the last line without an end is lost", "    if size:\n        yield number",
     "    if False:\n        yield number"),
    ("`contents` is not known", 'text = item["text"] if "text" in item else item["contents"]',
     'text = item.get("text")'),
    ("`metadata` is not known", 'item.get("meta", item.get("metadata"))', 'item.get("meta")'),
    ("metadata as a string are not read", "    if isinstance(meta, str):\n        try:",
     "    if False:\n        try:"),
    ("an empty document is one", "    if not text:\n"
     '        raise ValueError("an empty document")\n',
     ""),
    ("half of a surrogate pair is text", '        text.encode("utf-8")\n'
     "    except UnicodeEncodeError:",
     "        pass\n    except UnicodeEncodeError:"),
    ("a place is not gone on from", "known = (i, number) <= tuple(start)", "known = False"),
    ("line numbers from 0", "    number = 1\n    parts = []", "    number = 0\n    parts = []"),
    ("problems are not counted", "        self.counts[reason] += 1\n", "        self.counts[reason] = 1\n"),
    ("a text of Python's library comes twice", 'found[hashlib.sha256(text.encode("utf-8")).digest()] =',
     'found[hashlib.sha256((text + str(len(found))).encode("utf-8")).digest()] ='),
])
FAULTS += of("rebased/files.py", "test_files.py", [
    ("a file is written in place", 'temporary = path.with_name(path.name + ".tmp")', "temporary = path"),
    ("a digest is not looked at", "if hashlib.sha256(memoryview(data)[:-32]).digest() != data[-32:]:", "if False:"),
    ("loading runs code", "weights_only=True)", "weights_only=False)"),
    ("a second writer is let in", "        if not wait:\n            file.close()\n"
     "            raise Refusal",
     "        if False:\n            raise Refusal"),
    ("half a line stays", 'file.truncate(file.read().rfind(b"\\n") + 1)', "pass"),
    ("a torn last line is a row", '        if not line.endswith(b"\\n"):\n            break\n',
     ""),
    ("a row may lack a field", 'elif not name.endswith("?"):', "elif False:"),
    ("a list may be empty", "        return len(value) > 0\n", "        return True\n"),
    ("true is a number", "isinstance(value, kind) and (not isinstance(value, bool) or kind in (bool, object))",
     "isinstance(value, kind)"),
    ("a length may lack a cell", "                if cell not in row[field]:\n", "                if False:\n"),
    ("items of a list are not looked at", "        for number, item in enumerate(value):\n",
     "        for number, item in ():\n"),
]) + of("experiments/mqar_report.py", "test_rows.py", [
    ("shares in some cells only", 'for share in ("right", "others", "filler")}) > 1:',
     'for share in ("right", "others", "filler")}) > 2:'),
])
FAULTS += of("rebased/pile_run.py", "test_05_train_pile.py", [
    ("the log is doubled on resume", 'with open(place, "w", encoding="utf-8") as file, tqdm(',
     'with open(place, "a", encoding="utf-8") as file, tqdm('),
    ("another run's folder is taken", "    if old and options.out:\n", "    if False:\n"),
    ("two runs write to a folder", "with files.claim(out) if RANK == 0 else nullcontext():", "with nullcontext():"),
    ("other data are trained on", 'if found["data"] != [data.manifest["sources"], data.manifest["sizes"]]:',
     "if False:"),
    ("a checkpoint of another format", 'if content.get("format") != FORMAT:', "if False:"),
    ("nothing is computed again", "    if settings.recompute:\n", "    if False:\n"),
    ("rows do not say their hardware", "rows = [about | row for row in rows]", "rows = [dict(row) for row in rows]"),
])
FAULTS += of("rebased/pile_settings.py", "test_05_train_pile.py", [
    ("a run may go on at another rate", 'FREE = {"micro_batch",', 'FREE = {"lr", "micro_batch",'),
    ("a run may not go on with another micro-batch", 'FREE = {"micro_batch",', "FREE = {"),
    ("a batch need not be whole sequences", "        if self.batch_tokens % self.seq_len:\n", "        if False:\n"),
    ("the paper's batch is 1,024 tokens", '"batch_tokens": 1024 * 4096,', '"batch_tokens": 4096,'),
    ("a setting that is no number", "if not least <= getattr(self, name) < MOST:",
     "if getattr(self, name) < least or getattr(self, name) >= MOST:"),
])
FAULTS += of("rebased/lesson.py", "test_lesson.py test_files.py", [
    ("a failed check passes", '        TALLY["failed"] += 1\n', ""),
    ("the exit status is 0", "    if failed:\n        raise SystemExit(1)\n",
     ""),
    ("python -O passes every check", "        if not __debug__:\n"
     "            raise AssertionError",
     "        if False:\n            raise AssertionError"),
    ("seeds up to 2^32", "int(text) >= 2**31:", "int(text) >= 2**32:", "test_04_train_mqar.py"),
    ("the first turn counts", "            if turn > 0:\n", "            if turn >= 0:\n"),
    ("false is true", '{"true": True, "false": False}[value.lower()]', "bool(value)"),
    ("names of lines lie on each other", "heights[i] = max(heights[i], heights[i - 1] + gap)",
     "heights[i] = max(heights[i], heights[i - 1])"),
    ("names of lines in the order of the first", "    ends = sorted(ends, key=lambda end: end[1])\n",
     "    ends = list(ends)\n"),
])
FAULTS += of("rebased/workers.py", "test_workers.py", [
    ("a worker has all threads", "    torch.set_num_threads(1)\n", ""),
    ("what a run returned is kept for another", "keep(runs[number], future.result())",
     "keep(runs[0], future.result())"),
    ("a worker that died goes unsaid", "        if isinstance(stop, BrokenProcessPool):\n", "        if False:\n"),
])
FAULTS += of("rebased/mqar_options.py", "test_04_train_mqar.py", [
    ("lengths unsorted and twice", "options.lengths = sorted(set(options.lengths))",
     "options.lengths = list(options.lengths)"),
    ("rows and figure in one file", "if options.output.resolve() == options.figure.resolve():", "if False:"),
    ("a context without room for its pairs", "    if options.lengths[0] < 4 * run.pairs:\n", "    if False:\n"),
])
FAULTS += of("experiments/sweep.py", "test_experiments_mqar.py", [
    ("shards overlap", "return items[i - 1 :: n]", "return items[max(0, i - 2) :: n]"),
    ("all runs have one checkpoint", "sha256(key.encode()).hexdigest()[:16]", 'sha256(b"").hexdigest()[:16]'),
])
FAULTS += of("experiments/pile_sample.py", "test_experiments_pile.py", [
    ("a state of another model is taken", '    if content["state_of"] != model_digest(model):\n', "    if False:\n"),
    ("a text begins anew", "generate(model, tokens[:, -1:], length, temperature, top_k, states)",
     "generate(model, tokens[:, -1:], length, temperature, top_k)"),
    ("the last token is read twice", "states = read_context(model, torch.tensor([ids[:-1]], device=device), states)",
     "states = read_context(model, torch.tensor([ids], device=device), states)"),
])
FAULTS += of("experiments/pile_report.py", "test_experiments_pile.py", [
    ("softmax costs as a kernel does", "flops += 3 * 2 * T * config.d_model", "flops += 3 * 2 * config.d_model"),
    ("utilisation of all devices as of one", 'share = tflops / row["processes"] / peak', "share = tflops / peak"),
    ("the mixing counts forward only", "flops += 3 * 4 * features * config.d_model",
     "flops += 4 * features * config.d_model"),
])
FAULTS += [
    same("04_train_mqar.py", "the first head for the mean",
         "weights = weights.mean(1)  # (B, K, T): heads averaged",
         "weights = weights[:, 0]",
         "the models of 04 have one head"),
    same("rebased/rwkv.py", "the sums run under autocast", "with without_autocast(k.device):", "if True:",
         "none of these operations is one that autocast rounds; the line keeps it so"),
    same("01_kernels.py", "elu is at least −1 + 1e-45",
         "F.elu(x) + 1",
         "(F.elu(x) + 1).clamp(min=0)",
         "elu(x) + 1 is never below 0"),
]


# Planting
def problem_of(fault, root=ROOT):
    """What is wrong with a record, in one line; None if it can be planted."""
    path = root / fault.file
    count = path.read_text(encoding="utf-8").count(fault.text) if path.exists() else 0
    if count != 1:
        return f"{fault.file}: {fault.what}: its text is there {count} times, not once; mend the record of this fault"
    if fault.text == fault.instead:
        return f"{fault.file}: {fault.what}: nothing is changed; mend the record of this fault"
    missing = [name for name in fault.tests.split() if not (root / "tests" / name).exists()]
    if missing:
        return f"{fault.file}: {fault.what}: there is no tests/{missing[0]}; mend the record of this fault"
    return None


def load_libraries():
    """Import what the tests need, before processes are forked: that is most of the time of a short test."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in LIBRARIES:
        try:
            import_module(name)
        except ImportError:
            pass


def run_tests(copy, tests, environment):
    """In a process of its own: run these test files in a copy until the first failure; output goes beside the copy."""
    import pytest

    output = os.open(f"{copy}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(copy)
    os.environ.update(environment)
    sys.path[0] = str(copy)
    files = [f"tests/{name}" for name in tests.split()]
    status = pytest.main(["-x", "-q", "--tb=line", "-p", "no:cacheprovider", *files])
    sys.stdout.flush()
    os._exit(status)


def start_tests(copy, tests, environment=()):
    """`run_tests` as a process. Forked, where the system can: then libraries need not be loaded again."""
    how = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    process = multiprocessing.get_context(how).Process(target=run_tests, args=(copy, tests, dict(environment)))
    process.start()
    return process


def verdict(status, output):
    """"SURVIVED", or "killed by ...". Raises SystemExit if the tests did not run."""
    if status == 0:
        return "SURVIVED"
    found = re.findall(r"^(?:FAILED|ERROR) (?:tests/)?(\S+)", output, re.M)
    if status not in (1, 2) or not found:
        raise SystemExit(f"pytest ended with status {status} and without a verdict:\n{output[-2000:]}")
    return f"killed by {found[0]}"


SECONDS = itertools.count(1_000_000_000)


def write(path, content):
    """Each time with another time of change: Python takes bytecode for fresh if size and second of a file agree."""
    path.write_bytes(content)
    second = next(SECONDS)
    os.utime(path, (second, second))


class Planted:
    """A fault in a copy, and the tests that run there."""

    def __init__(self, fault, copy):
        self.fault = fault
        self.copy = copy
        self.path = copy / fault.file
        self.before = self.path.read_bytes()
        write(self.path, self.before.replace(fault.text.encode(), fault.instead.encode()))
        # GPU kernels run in Triton's interpreter
        environment = {"TRITON_INTERPRET": "1"} if fault.file == "rebased/triton_kernels.py" else {}
        self.start = time.monotonic()
        self.process = start_tests(copy, fault.tests, environment)

    def result(self):
        """What became of the fault, which is then taken out again; None while the tests run."""
        late = time.monotonic() - self.start > LONGEST
        if self.process.is_alive() and not late:
            return None
        self.process.kill()
        self.process.join()
        write(self.path, self.before)
        if late:
            return f"killed by the time limit of {LONGEST} s"
        return verdict(self.process.exitcode, Path(f"{self.copy}.txt").read_text(encoding="utf-8", errors="replace"))


def plant_all(faults, copies):
    """Yields (fault, what became of it, seconds), one fault at a time in each copy."""
    waiting = list(faults)
    free = list(copies)
    running = []
    while waiting or running:
        while waiting and free:
            running.append(Planted(waiting.pop(0), free.pop()))
        time.sleep(0.05)
        for planted in list(running):
            found = planted.result()
            if found:
                running.remove(planted)
                free.append(planted.copy)
                yield planted.fault, found, time.monotonic() - planted.start


def check_the_copy(copy, faults):
    """The tests must pass before anything is planted, or every fault would seem to be killed."""
    names = dict.fromkeys(name for fault in faults for name in fault.tests.split())
    process = start_tests(copy, " ".join(names))
    process.join()
    if process.exitcode != 0:
        output = Path(f"{copy}.txt").read_text(encoding="utf-8", errors="replace")
        raise SystemExit(f"the tests fail without a fault; mend that first:\n{output[-2000:]}")


def report(results):
    """killed / all, by file and in total; results: [(fault, what became of it)]."""
    planted = Counter(fault.file for fault, _ in results)
    killed = Counter(fault.file for fault, found in results if found != "SURVIVED")
    print("\nkilled / all")
    for file in sorted(planted):
        print(f"  {file:32}{killed[file]:4} /{planted[file]:4}")
    total = len(results)
    print(f"  {'in total':32}{killed.total():4} /{total:4}   {killed.total() / total:.1%}")


def read_options(argv):
    parser = argparse.ArgumentParser(description="plant faults one at a time and see which the quick tests notice")
    parser.add_argument("--only", metavar="WORD", default="", help="those whose file or description holds this word")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="copies at once (%(default)s)")
    options = parser.parse_args(argv)
    options.chosen = [fault for fault in FAULTS if options.only in fault.file or options.only in fault.what]
    problems = [problem for fault in options.chosen if (problem := problem_of(fault))]
    if not options.chosen:
        problems = [f"no fault has {options.only!r} in its file or description"]
    if options.processes < 1:
        problems = [f"--processes must be at least 1, got {options.processes}"]
    if problems:
        parser.error(problems[0])
    return options


def main(argv=None):
    options = read_options(argv)
    for fault in options.chosen:
        if fault.same:
            print(f"{fault.file}: {fault.what}: no fault, for {fault.same}")
    faults = [fault for fault in options.chosen if not fault.same]
    if not faults:
        return
    load_libraries()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        copies = [Path(folder) / str(number) for number in range(options.processes)]
        for copy in copies:
            shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
        check_the_copy(copies[0], faults)
        for fault, found, seconds in plant_all(faults, copies):
            print(f"{fault.file}: {fault.what}: {found} ({seconds:.0f} s)", flush=True)
            results.append((fault, found))
    report(results)


if __name__ == "__main__":
    main()
