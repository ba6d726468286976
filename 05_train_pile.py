"""05 · The Pile: train, evaluate and sample language models with ReBased, Based and softmax attention

Aim: take tokens to trained models and honest numbers, with one program for a laptop and for many GPUs.

You will learn
  1. a training loop that can be killed at any moment and goes on as if nothing had happened;
  2. how several processes can make the very numbers of one: the order of a sum is part of the result;
  3. how every token is scored once, with enough context, and what the slices of the loss say;
  4. decoding at constant cost: read a document once, keep its state, continue it many times.

Equations
  loss             mean of −ln p(x_t | x_<t) over all tokens, separators between documents too
  perplexity       exp(loss); over a slice of the tokens: exp of the loss of that slice
  bits per byte    (tokens / bytes) · loss / ln 2, without separators: comparable between vocabularies      [G]
  learning rate    lr · min(t/warmup, 1), then half a cosine to 0

Letters: as in 03; T the length of a training sequence, V the size of the vocabulary.

References: [P] as in 01, Table 2 and Appendix C; [G] Gao et al., The Pile, arXiv 2101.00027, section 3.1.

Run: python 05_train_pile.py                        (2 minutes on two cores, nothing to download)
     python 05_train_pile.py --sample "import " --checkpoint runs/pile/rebased/checkpoint.pt
     torchrun --nproc-per-node 8 05_train_pile.py --preset paper --data FOLDER --mixers rebased --out runs/paper
"""
# %%
import argparse
import hashlib
import io
import json
import math
import os
import platform
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm

kernels = import_module("01_kernels")
linear_attention = import_module("02_linear_attention")
cost = import_module("02_linear_attention_cost")
models = import_module("03_model")
pile_data = import_module("05_pile_data")
Refusal, read_documents, recall_mask = pile_data.Refusal, pile_data.read_documents, pile_data.recall_mask

# %% Settings: one dataclass, one command-line option for each field, two presets
def option(default, help, limit=None):
    return field(default=default, metadata={"help": help, "limit": limit})


@dataclass(frozen=True)
class Settings:
    """Everything that decides what is trained and how it is measured. Raises Refusal for what cannot be run."""

    model: str = option("laptop", "laptop: 0.7 M parameters; paper: the paper's 150 M", ("laptop", "paper"))
    tokenizer: str = option("bytes", "bytes, gpt2 or gpt-neox", pile_data.TOKENIZERS)
    valid_share: float = option(0.05, "share of the documents kept for validation")
    seq_len: int = option(512, "tokens in a sequence", 2)
    batch_tokens: int = option(4096, "tokens in a global batch, whatever the number of processes", 1)
    micro_batch: int = option(4, "sequences in one forward pass", 1)
    steps: int = option(120, "batches to train on", 1)
    warmup: int = option(20, "steps of linear warm-up", 0)
    lr: float = option(4e-3, "highest learning rate")
    weight_decay: float = option(0.1, "of matrices; vectors have none", 0)
    clip: float = option(1.0, "largest norm of the gradient")
    seed: int = option(0, "of the initial weights and the order of the data", 0)
    save_every: int = option(1000, "steps between checkpoints", 1)
    eval_tokens: int = option(150_000, "validation tokens to score (whole documents)", 1)
    eval_length: int = option(2048, "longest context of the loss by position", 1)

    def __post_init__(self):
        for item in fields(self):
            name, value, limit = item.name.replace("_", "-"), getattr(self, item.name), item.metadata["limit"]
            if isinstance(limit, tuple) and value not in limit:
                raise Refusal(f"--{name} must be one of {', '.join(limit)}, got {value!r}")
            if isinstance(limit, int) and not value >= limit:
                raise Refusal(f"--{name} must be at least {limit}, got {value}")
        if self.batch_tokens % self.seq_len:
            raise Refusal(f"--batch-tokens {self.batch_tokens} is no multiple of --seq-len {self.seq_len}")
        if not (0 < self.lr < math.inf and self.clip > 0):
            raise Refusal("--lr and --clip must be positive")


# The paper's settings [P App. C]. Its "effective batch 1024" has no unit; taken as sequences it is 4.2 M tokens.
PRESETS = {
    "laptop": {},
    "paper": dict(model="paper", tokenizer="gpt-neox", valid_share=0.001, seq_len=4096, batch_tokens=1024 * 4096,
                  micro_batch=8, steps=20_000, warmup=200, lr=1e-3, save_every=500, eval_tokens=2_000_000, eval_length=16_384),
}

FREE = {"micro_batch", "save_every", "eval_tokens", "eval_length"}  # may differ when a run is continued


def laptop_config(mixer, vocab_size):
    """Four layers, the paper's Pile model made small; softmax has a smaller MLP, so that all sizes are equal."""
    mlp = 235 if mixer == "attention" else 256
    return models.ModelConfig(("gated_conv", mixer) * 2, vocab_size, 128, heads=4, norm="rms", mlp=mlp)


def model_config(mixer, settings, vocab_size):
    """The ModelConfig of a mixer under these settings."""
    paper = replace(models.pile_config(mixer), vocab_size=vocab_size)
    return paper if settings.model == "paper" else laptop_config(mixer, vocab_size)

# %% One step, in any number of processes
# Within 50 steps ReBased makes 10⁻³ of a rounding error of 10⁻⁷, for the gradient of a nearly vanishing normaliser is
# large: several processes have the loss curve of one only if they make the same numbers, bit for bit. So the unit of
# work, a micro-batch, does not know who computes it, and as (a + b) + c is not a + (b + c), sums have one order:
# micro-batches in pairs, pairs of pairs, ... Each process has a branch of that tree, and branches are added likewise.
# That serves 1, 2, 4, 8, ... processes with equally many threads each (OMP_NUM_THREADS; torchrun sets it to 1); any
# other number that divides the micro-batches agrees up to rounding.
class Place(NamedTuple):
    """Where this process runs: its device, its number, how many there are."""

    device: torch.device
    rank: int = 0
    world: int = 1


def learning_rate(step, settings):
    """Linear warm-up, then half a cosine down to 0 after the last step."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * done))


def make_optimizer(model, settings, device):
    """AdamW; decay on matrices only, for a norm, a bias, γ or β has no reason to be small."""
    groups = [{"params": [p for p in model.parameters() if (p.ndim == 2) == is_matrix],
               "weight_decay": settings.weight_decay * is_matrix} for is_matrix in (True, False)]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), fused=device.type == "cuda")


def losses_of(model, tokens, device, reduction="none"):
    """−ln p of every next token: tokens (B, T + 1) -> (B, T). bf16 on a GPU, the loss itself in float32."""
    tokens = tokens.to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        logits = model(tokens[:, :-1])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction=reduction)


def gradient(model, parts, settings, device):
    """The share of these micro-batches in the mean loss over the global batch, and its gradient, as one vector."""
    if len(parts) > 1:
        halves = parts[: len(parts) // 2], parts[len(parts) // 2 :]
        return torch.add(*(gradient(model, half, settings, device) for half in halves))
    share = len(parts[0]) * settings.seq_len / settings.batch_tokens
    loss = losses_of(model, parts[0], device, "mean") * share
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([*(grad.flatten() for grad in grads), loss.detach().view(1)])


def add_up(x, place):
    """x summed over all processes: with the neighbour, then pairs with pairs, ..., the upper branches of the tree."""
    if place.world & (place.world - 1):
        dist.all_reduce(x)
        return x
    for level in range(place.world.bit_length() - 1):
        theirs, other = torch.empty_like(x), place.rank ^ 2**level
        calls = [dist.P2POp(dist.isend, x, other), dist.P2POp(dist.irecv, theirs, other)]
        for request in dist.batch_isend_irecv(calls):
            request.wait()
        x = x + theirs
    return x


def train_step(model, optimizer, parts, step, settings, place):
    """One update from this process's micro-batches: returns the record of it."""
    start, parameters = time.perf_counter(), list(model.parameters())
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, settings)
    *grads, loss = add_up(gradient(model, parts, settings, place.device), place).split([*map(torch.numel, parameters), 1])
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad.view_as(parameter)
    norm, loss = torch.nn.utils.clip_grad_norm_(parameters, settings.clip).item(), loss.item()
    if not math.isfinite(loss + norm):
        raise Refusal(f"step {step}: loss {loss}, gradient {norm}; lower --lr (the last checkpoint is intact)")
    optimizer.step()
    rate = settings.batch_tokens / (time.perf_counter() - start)
    return {"step": step, "loss": loss, "lr": learning_rate(step, settings), "norm": norm, "tokens_per_s": rate}

# %% Checkpoints
# Weights, optimiser, settings, and the records of all steps so far: their number is the place in the data and in the
# schedule of the learning rate. Training draws no random numbers (the models have no dropout), so there is no random
# state to keep. Tensors and plain types only: `weights_only=True` runs no code when it loads.
def save_checkpoint(path, model, optimizer, log, mixer, settings, data):
    """Serialise in memory, then write atomically: a kill at any moment leaves the old file or the new one."""
    content = {
        "format": 2, "model": model.state_dict(), "optimizer": optimizer.state_dict(), "log": log, "mixer": mixer,
        "config": asdict(model.config), "settings": asdict(settings), "tokenizer": pile_data.identity(data.vocabulary),
        "data": [data.manifest["sources"], data.manifest["sizes"]],
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    pile_data.write_atomically(path, buffer.getbuffer())


def load_checkpoint(path):
    """The content of a checkpoint. Raises Refusal if it is not one."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["format"] == 2:
            return content
    except FileNotFoundError:
        raise Refusal(f"{path}: no such checkpoint") from None
    except Exception:  # a zip error, a pickle that wants to run code, a missing key: it is not ours
        pass
    raise Refusal(f"{path}: not a checkpoint of this program, or damaged")


def restore(path, model, optimizer, mixer, settings, data):
    """Put a checkpoint back; returns the records of its steps. Raises Refusal if it belongs to another run."""
    found = load_checkpoint(path)
    old, new = found["settings"] | {"mixer": found["mixer"]}, asdict(settings) | {"mixer": mixer}
    for name in new.keys() - FREE:
        if old.get(name) != new[name]:
            raise Refusal(f"{path} was made with {name} = {old.get(name)}, not {new[name]}; --resume changes nothing")
    if found["data"] != [data.manifest["sources"], data.manifest["sizes"]]:
        raise Refusal(f"{path} was trained on other data; give the same --data, or another --out")
    model.load_state_dict(found["model"])
    optimizer.load_state_dict(found["optimizer"])
    return found["log"]

# %% Training
def make_model(mixer, settings, data, place):
    """A model from the seed: the same weights in every process."""
    torch.manual_seed(settings.seed)
    return models.LanguageModel(model_config(mixer, settings, data.vocabulary.size)).to(place.device)


def make_ready(model, options):
    """What wraps a model for training: recomputed blocks for long sequences, torch.compile."""
    if options.recompute:
        for block in model.blocks:
            block.forward = partial(recompute, block.forward, use_reentrant=False)
    return torch.compile(model) if options.compile else model


def begin(mixer, settings, data, path, place, options):
    """(model, optimizer, log) of a new run, or of the checkpoint at `path` with --resume."""
    model = make_model(mixer, settings, data, place)
    optimizer, log = make_optimizer(model, settings, place.device), []
    if options.resume and path.exists():
        log = restore(path, model, optimizer, mixer, settings, data)
    elif place.rank == 0:
        path.unlink(missing_ok=True)  # of an earlier run
    if options.resume and place.rank == 0:
        print(f"{path}: {f'goes on at step {len(log)}' if log else 'no checkpoint there, begins at step 0'}")
    return model, optimizer, log


def train(mixer, settings, data, folder, place, options):
    """Train one model, or what is left of it with --resume. Returns the model and a record for each step."""
    path = folder / "checkpoint.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    model, optimizer, log = begin(mixer, settings, data, path, place, options)
    ready = make_ready(model, options)
    bar = tqdm(range(len(log), settings.steps), mixer, settings.steps, initial=len(log), disable=place.rank > 0)
    with open(folder / "log.jsonl" if place.rank == 0 else os.devnull, "w") as file:
        file.writelines(json.dumps(record) + "\n" for record in log)
        for step in bar:
            parts = pile_data.training_batch(data.train, settings, step, place.rank, place.world)
            log.append(train_step(ready, optimizer, parts, step, settings, place))
            print(json.dumps(log[-1]), file=file, flush=True)
            bar.set_postfix_str("loss {loss:.3f}, lr {lr:.1e}, norm {norm:.2f}, {tokens_per_s:,.0f} tokens/s".format(**log[-1]))
            if place.rank == 0 and ((step + 1) % settings.save_every == 0 or step + 1 == settings.steps):
                save_checkpoint(path, model, optimizer, log, mixer, settings, data)
    return model, log

# %% Every token scored once, with enough context
# Windows of T tokens begin every T/2; from each, the tokens count that no earlier one has scored. All but the first
# window's are thus predicted from T/2 tokens or more. A context may reach over a separator, as it does in training.
def scored_windows(total, T, stride):
    """Yields (start, first): of the window of T tokens at `start`, those from `first` on are scored."""
    start = done = 0
    while done < total:
        start = max(0, min(start, total - T))
        yield start, done
        start, done = start + stride, min(start + T, total)


@torch.no_grad()
def score(model, stream, T, device, common, per_pass=4096):
    """Losses (n,) of the tokens in stream (n,), its first entry (a separator) not counted, and their AR masks."""
    total, T = len(stream) - 1, min(T, len(stream) - 1)
    whole = {"loss": np.zeros(total)} | {name: np.zeros(total, dtype=bool) for name in pile_data.DEFINITIONS}
    windows, size = list(scored_windows(total, T, max(1, T // 2))), max(1, per_pass // T)
    for i in tqdm(range(0, len(windows), size), desc="evaluate", leave=False):
        part = windows[i : i + size]
        tokens = np.stack([stream[start : start + T + 1] for start, _ in part]).astype(np.int64)
        found = {name: recall_mask(tokens, name, common)[:, 1:] for name in pile_data.DEFINITIONS}
        found["loss"] = losses_of(model, torch.from_numpy(tokens), device).cpu().numpy()
        for name, target in whole.items():
            for (start, begin), row in zip(part, found[name], strict=True):
                target[begin : start + T] = row[begin - start :]
    return whole.pop("loss"), whole


def bits_per_byte(loss, tokens, num_bytes):
    """(tokens / bytes) · loss / ln 2 for a mean loss in nats over so many tokens. [G 3.1]"""
    return tokens / num_bytes * loss / math.log(2)


def validation_stream(data, limit):
    """Whole validation documents of about `limit` tokens: (stream with a separator first, their rows)."""
    docs = data.valid_docs
    if not len(docs):
        raise Refusal("no document fell into the validation part; give more documents or a larger --valid-share")
    docs = docs[: max(1, np.searchsorted(docs[:, 0], limit))]
    return np.append([data.vocabulary.separator], data.valid[: docs[-1, :2].sum() + 1]), docs


def perplexity(losses):
    return math.exp(min(700.0, losses.mean())) if len(losses) else math.nan


def evaluate(model, data, settings, device, common):
    """All numbers of one model, plain types only."""
    stream, docs = validation_stream(data, settings.eval_tokens)
    losses, masks = score(model, stream, settings.seq_len, device, common)
    subset = np.repeat(docs[:, 3], docs[:, 1] + 1)  # of every token; a separator belongs to the document it ends
    text = np.ones(len(losses), dtype=bool)
    text[docs[:, 0] + docs[:, 1]] = False  # False at separators
    subsets = {}
    for i in np.unique(subset).tolist():
        num_bytes, bits = docs[docs[:, 3] == i, 2].sum(), losses[text & (subset == i)].sum() / math.log(2)
        subsets[data.manifest["names"][i]] = {"bytes": int(num_bytes), "bits_per_byte": bits / max(1, num_bytes),
                                              "perplexity": perplexity(losses[subset == i])}
    slices = {name: {"share": mask.mean(), "recall": perplexity(losses[mask]), "other": perplexity(losses[~mask])}
              for name, mask in masks.items()}
    bits = bits_per_byte(losses[text].mean(), text.sum(), max(1, docs[:, 2].sum()))
    return {"loss": losses.mean(), "perplexity": perplexity(losses), "tokens": len(losses), "bits_per_byte": bits,
            "slices": slices, "subsets": subsets, "by_position": loss_by_position(model, stream, settings.eval_length, device)}


@torch.no_grad()
def loss_by_position(model, stream, length, device):
    """[(last position, mean loss)] of positions 1-16, 17-32, 33-64, ... in contexts of `length`, also unseen ones."""
    length = min(length, len(stream) - 1)
    starts = range(0, len(stream) - length, length)
    contexts = (torch.from_numpy(stream[None, start : start + length + 1].astype(np.int64)) for start in starts)
    total = sum(losses_of(model, context, device)[0].double() for context in contexts).cpu().numpy()
    edges = [0, *[2**n for n in range(4, 40) if 2**n < length], length]
    return [(b, (total[a:b] / len(starts)).mean()) for a, b in zip(edges, edges[1:], strict=False)]

# %% Generation
# A prompt is read by the chunked form, then every token costs one step. The state of a kernel model is a value of
# constant size: save it after a long document and continue that document many times without reading it again.
@torch.no_grad()
def read_context(model, ids, states=None, piece=8192):
    """Take ids (1, n) into the states, some thousand tokens at a time."""
    for part in ids.split(piece, dim=1) if ids.numel() else ():
        _, states = model.prefill(part, states)
    return states


def stream_text(model, vocabulary, ids, length, temperature, top_k, states=None):
    """Continue ids (a list, at least one): yields pieces of text until a separator is chosen or `length` tokens are."""
    held, ids = [], torch.tensor([ids], device=model.embedding.weight.device)
    states = read_context(model, ids[:, :-1], states)
    for token in models.generate(model, ids[:, -1:], length, temperature, top_k, states):
        if token.item() == vocabulary.separator:
            break
        held.append(token.item())
        text = vocabulary.decode(held)
        if not text.endswith("\ufffd") or len(held) > 8:  # a character may need several tokens
            yield text
            held = []
    yield vocabulary.decode(held)


def model_digest(model):
    """Which weights a state belongs to."""
    return hashlib.sha256(model.embedding.weight.detach().cpu().float().numpy().tobytes()).hexdigest()[:16]


def save_state(path, model, states, ids):
    """A state and the tokens not yet taken into it, as tensors and plain types: no class of ours."""
    layers = [state if isinstance(state, torch.Tensor) else tuple(state) for state in states]
    buffer = io.BytesIO()
    torch.save({"state_of": model_digest(model), "length": states.length, "layers": layers, "ids": ids}, buffer)
    pile_data.write_atomically(path, buffer.getbuffer())


def load_state(path, model):
    """-> (states, ids) of `save_state`. Raises Refusal for another model's."""
    try:
        content = torch.load(path, map_location=model.embedding.weight.device, weights_only=True)
        owner, length, layers, ids = content.values()
    except Exception:
        raise Refusal(f"{path}: cannot be read as a saved state") from None
    if owner != model_digest(model):
        raise Refusal(f"{path} is the state of another model; read the document again with this one")
    states = models.States(linear_attention.State(*layer) if name in models.KERNEL_NAMES else layer
                           for name, layer in zip(model.config.mixers, layers, strict=True))
    states.length = length
    return states, ids


def load_model(path, device, tokenizer_file=None):
    """A checkpoint's model and vocabulary. Raises Refusal."""
    content = load_checkpoint(path)
    vocabulary = pile_data.make_vocabulary(content["tokenizer"]["name"], tokenizer_file)
    if pile_data.identity(vocabulary) != content["tokenizer"]:
        raise Refusal(f"{path} was trained with another {vocabulary.name} tokenizer; give its --tokenizer-file")
    model = models.LanguageModel(models.ModelConfig(**content["config"]))
    model.load_state_dict(content["model"])
    return model.to(device).eval(), vocabulary


def sample_command(options, device):
    """--sample, --document, --save-state, --load-state: returns 0."""
    if options.sample is None and not options.save_state:
        raise Refusal("a document or a state alone asks for nothing: add --sample PROMPT or --save-state FILE")
    if options.length < 1 or options.temperature < 0 or (options.top_k or 1) < 1:
        raise Refusal("--length and --top-k must be at least 1, --temperature must not be negative")
    model, vocabulary = load_model(options.checkpoint, device, options.tokenizer_file)
    torch.manual_seed(options.seed or 0)
    states, ids = load_state(options.load_state, model) if options.load_state else (None, [vocabulary.separator])
    if options.document:
        ids = ids + vocabulary.encode(options.document.read_text("utf-8", "replace"))[0].tolist()
    if options.save_state:  # all but the last token: that one predicts what follows
        if len(ids) == 1:
            raise Refusal("--save-state needs a --document to read")
        states, ids = read_context(model, torch.tensor([ids[:-1]], device=device), states), ids[-1:]
        save_state(options.save_state, model, states, ids)
        print(f"{states.length:,} tokens read; state of {models.state_bytes(states):,} bytes in {options.save_state}")
    if options.sample is not None:
        ids = ids + vocabulary.encode(options.sample)[0].tolist()
        print(options.sample, end="", flush=True)
        for text in stream_text(model, vocabulary, ids, options.length, options.temperature, options.top_k, states):
            print(text, end="", flush=True)
        print()
    return 0

# %% What a token costs after a long context
CONTEXTS = (1024, 4096, 16_384, 65_536)


@torch.no_grad()
def decoding_costs(mixer, contexts=CONTEXTS, repeats=100):
    """[(bytes of state, median seconds of a step)] after these contexts, which take turns."""
    torch.manual_seed(0)
    model = models.LanguageModel(laptop_config(mixer, 256)).eval()
    states = {context: models.states_after(model, context, batch=1) for context in contexts}
    calls = {context: partial(model.step, torch.tensor([65]), state) for context, state in states.items()}
    times = cost.interleaved(calls, repeats)
    return [(models.state_bytes(states[context]), times[context]) for context in contexts]


def print_decoding(mixers):
    print("One more token after a context of so many: kilobytes of state, milliseconds (median of 100, taking turns)\n")
    print(f"{'':10}" + "".join(f"{context:>22,}" for context in CONTEXTS))
    for mixer in mixers:
        print(f"{mixer:10}" + "".join(f"{size / 1024:10,.0f} KB {s * 1e3:5.2f} ms" for size, s in decoding_costs(mixer)))
    return 0

# %% Claims
def check_every_token_is_scored_once():
    """Windows of any size cover the tokens without overlap of what is scored, with T/2 of context or more."""
    for total in (1, 7, 8, 9, 31, 100):
        for T in (1, 2, 8, 16):
            T, covered = min(T, total), []
            for start, begin in scored_windows(total, T, max(1, T // 2)):
                assert start == 0 or begin - start >= T // 2
                covered += range(begin, start + T)
            assert covered == list(range(total)), (total, T)


def check_uniform_is_eight_bits():
    """A model without an opinion needs 8 bits per byte."""
    model = models.LanguageModel(laptop_config("rebased", 256))
    torch.nn.init.zeros_(model.embedding.weight)
    losses, _ = score(model, np.arange(300) % 256, 64, torch.device("cpu"), ())
    assert abs(bits_per_byte(losses.mean(), 299, 299) - 8) < 1e-6


CHECKS = [check_every_token_is_scored_once, check_uniform_is_eight_bits]

# %% Tables and the figure
def print_tables(rows, settings):
    """The models; the slices under three definitions; the subsets."""
    print(f"\n{settings.steps} steps of {settings.batch_tokens:,} tokens, T = {settings.seq_len}; validation: "
          f"{rows[0]['tokens']:,} tokens. AR: the bigram occurred earlier in the context.\n")
    print(f"{'model':10}{'parameters':>12}{'loss':>8}{'bits/byte':>11}{'perplexity':>12}{'AR':>8}{'other':>9}{'tokens/s':>10}")
    for row in rows:
        recall, other = row["slices"]["bigram"]["recall"], row["slices"]["bigram"]["other"]
        print(f"{row['mixer']:10}{row['parameters']:12,}{row['loss']:8.3f}{row['bits_per_byte']:11.3f}"
              f"{row['perplexity']:12.2f}{recall:8.2f}{other:9.2f}{row['tokens_per_s']:10,.0f}")
    for title, key, show in (("AR / other perplexity", "slices", "{recall:.2f} / {other:.2f}"),
                             ("bits per byte by subset", "subsets", "{bits_per_byte:.3f}")):
        print(f"\n{title:24}{'':11}" + "".join(f"{row['mixer']:>18}" for row in rows))
        for name, cell in rows[0][key].items():
            about = f"{cell['share']:10.1%} " if key == "slices" else f"{cell['bytes']:10,} "
            print(f"{name:24}{about}" + "".join(f"{show.format(**row[key][name]):>18}" for row in rows))
    print()


def draw(rows, logs, settings, path):
    """Training loss against tokens; loss against the position in the context."""
    plt = kernels.pyplot()
    if plt is None:
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for row, log in zip(rows, logs, strict=True):
        left.plot(settings.batch_tokens * np.arange(1, len(log) + 1), [record["loss"] for record in log], label=row["mixer"])
        right.plot(*zip(*row["by_position"], strict=True), "o-", label=row["mixer"])
    right.axvline(settings.seq_len, color="gray", linestyle=":", linewidth=1)
    left.set(title="training", xlabel="tokens", ylabel="loss, nats a token")
    right.set(title="validation, by position (dotted: trained length)", xlabel="position in the context", xscale="log")
    left.legend(frameon=False)
    figure.savefig(path, dpi=120)
    print(f"figure: {path}")


def print_reading(rows, settings):
    """What the table says."""
    first, *_ = ordered = sorted(rows, key=lambda row: row["bits_per_byte"])
    ranking, slices = ", ".join(f"{row['mixer']} {row['bits_per_byte']:.3f}" for row in ordered), first["slices"]["bigram"]
    print(f"Bits per byte after {settings.steps * settings.batch_tokens:,} tokens, one seed: {ranking}.\n"
          f"{slices['share']:.0%} of the tokens end a bigram that the context has had: perplexity {slices['recall']:.2f} for "
          f"{first['mixer']}, {slices['other']:.2f} for the others.\nSo short a run shows how to measure, not which is best.\n")

# %% The command line
def make_parser():
    parser = argparse.ArgumentParser(usage="%(prog)s [options]; --help lists them", description="05: language models (2 minutes)")
    run = parser.add_argument_group("what to run")
    run.add_argument("--data", nargs="+", help="files or folders in the Pile's format (default: Python's own library)")
    run.add_argument("--preset", choices=PRESETS, default="laptop", help="defaults of the settings (%(default)s)")
    run.add_argument("--mixers", nargs="+", default=["rebased", "based", "attention"],
                     choices=("attention", *models.KERNEL_NAMES), metavar="MIXER", help="the models to train, in turn")
    run.add_argument("--out", type=Path, help="folder for checkpoints and logs (runs/pile: replaced each time)")
    run.add_argument("--resume", action="store_true", help="continue what --out holds; begin what it does not")
    run.add_argument("--tokens", type=Path, help="folder for tokenised data (runs/tokens-...)")
    run.add_argument("--tokenizer-file", type=Path, help="a local tokenizer.json")
    run.add_argument("--device", help="cpu, cuda, cuda:1, ... (cuda if there is one)")
    run.add_argument("--compile", action="store_true", help="torch.compile the model")
    run.add_argument("--recompute", action="store_true", help="gradient checkpointing: less memory, a third more time")
    run.add_argument("--peak-tflops", type=float, help="of one GPU, to print the utilisation (H100, bf16: 989)")
    run.add_argument("--figure", type=kernels.writable, default="runs/05_train_pile.png", help="(%(default)s)")
    run.add_argument("--decode-cost", action="store_true", help="only time decoding after contexts of up to 65,536")
    speak = parser.add_argument_group("sampling from a checkpoint")
    speak.add_argument("--sample", metavar="PROMPT", help="continue this text")
    speak.add_argument("--checkpoint", type=Path, default="runs/pile/rebased/checkpoint.pt", help="(%(default)s)")
    speak.add_argument("--document", type=Path, help="a text to read before the prompt")
    speak.add_argument("--save-state", type=Path, help="keep the state after the document")
    speak.add_argument("--load-state", type=Path, help="go on from such a state")
    speak.add_argument("--length", type=int, default=300, help="tokens to generate (%(default)s)")
    speak.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest (%(default)s)")
    speak.add_argument("--top-k", type=int, help="choose among the likeliest k only")
    settings = parser.add_argument_group("settings (defaults of the laptop preset)")
    for item in fields(Settings):
        settings.add_argument(f"--{item.name.replace('_', '-')}", type=type(item.default), metavar="X",
                              help=f"{item.metadata['help']} ({item.default})".replace("%", "%%"))
    return parser


def find_place(device):
    """This process among those of torchrun; alone without it. Raises Refusal for a device that is not there."""
    rank, world, local = (int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    try:
        device = torch.device(device or (f"cuda:{local}" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise Refusal(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return Place(device, rank, max(1, world))


def check_first(options, settings, place, out):
    """Raises Refusal if the processes cannot share a batch evenly, or if --out holds what would be lost."""
    parts = math.ceil(settings.batch_tokens / settings.seq_len / settings.micro_batch)
    if parts % place.world:
        raise Refusal(f"{place.world} processes cannot share {parts} micro-batches evenly; change --micro-batch")
    held = [out / mixer for mixer in options.mixers if (out / mixer / "checkpoint.pt").exists()]
    if options.out and held and not options.resume:
        raise Refusal(f"{held[0]} holds a checkpoint: continue it with --resume, or choose another --out")


def train_and_compare(options, settings, place, argv):
    """Train each mixer, evaluate it, show the table; returns how many checks failed."""
    started, out, main = time.time(), options.out or Path("runs/pile"), place.rank == 0
    source = cost.provenance(__file__, argv)  # now: the commit may be another one when the run ends
    check_first(options, settings, place, out)
    vocabulary = pile_data.make_vocabulary(settings.tokenizer, options.tokenizer_file)
    with pile_data.claim(out) if main else nullcontext():
        data = pile_data.load_data(options.data, vocabulary, settings.valid_share, options.tokens, main)
        rows, logs = [], []
        if main:
            pile_data.print_table(data)
            validation_stream(data, settings.eval_tokens)  # refuses now, not after hours
            common = pile_data.common_bigrams(data.train)
        for mixer in options.mixers:
            model, log = train(mixer, settings, data, out / mixer, place, options)
            if main:
                rows.append(measure(mixer, model, log, data, settings, place, common, options.peak_tflops))
                logs.append(log)
            if place.world > 1:
                dist.barrier()
        if not main:
            return 0
        source |= {"python": platform.python_version(), "minutes": round((time.time() - started) / 60, 1),
                   "processes": place.world, "threads": torch.get_num_threads()}
        if place.device.type == "cuda":
            source["hardware"] = torch.cuda.get_device_name(place.device)
        return report(rows, logs, settings, out, options.figure, source)


def flops_per_token(config, T):
    """Multiplications and additions of a training step per token: 6 a weight, and 3 times the mixers' forward."""
    P, width = config.feature_dim * (config.feature_dim + 1) // 2, config.d_model
    mixing = {"attention": 2 * T * width} | dict.fromkeys(models.KERNEL_NAMES, 4 * P * width)
    return 6 * models.count_parameters(config) + 3 * sum(mixing.get(name, 0) for name in config.mixers)


def measure(mixer, model, log, data, settings, place, common, peak, prompt="def "):
    """The row of a trained model. Prints some lines in its own words, and how busy it kept the hardware."""
    torch.manual_seed(0)
    ids = [data.vocabulary.separator, *data.vocabulary.encode(prompt)[0].tolist()]
    text = prompt + "".join(stream_text(model.eval(), data.vocabulary, ids, 160, 0.7, None))
    print(f"\n{mixer}, continuing {prompt!r}:\n" + "\n".join(f"  | {line}" for line in text.splitlines()))
    rate = float(np.median([record["tokens_per_s"] for record in log]))
    if peak:
        tflops = rate * flops_per_token(model.config, settings.seq_len) / 1e12
        print(f"  {tflops:.1f} TFLOP/s by the model's own count, {tflops / place.world / peak:.1%} of the peak")
    return {"mixer": mixer, "parameters": models.count_parameters(model.config), "tokens_per_s": rate,
            "seed": settings.seed, "settings": asdict(settings), **evaluate(model, data, settings, place.device, common)}


def report(rows, logs, settings, out, figure, source):
    """Tables, reading, figure, the rows as JSON lines, the checks."""
    print_tables(rows, settings)
    print_reading(rows, settings)
    pile_data.write_atomically(out / "results.jsonl", "".join(json.dumps(source | row) + "\n" for row in rows).encode())
    draw(rows, logs, settings, figure)
    print(f"rows: {out / 'results.jsonl'}\n")
    return kernels.run_checks(CHECKS)


def run(options, argv):
    """What the options ask for; returns how many checks failed."""
    if options.decode_cost:
        return print_decoding(options.mixers)
    place = find_place(options.device)
    if options.sample is not None or options.document or options.save_state or options.load_state:
        return sample_command(options, place.device)
    given = {item.name: getattr(options, item.name) for item in fields(Settings)}
    settings = Settings(**PRESETS[options.preset] | {name: value for name, value in given.items() if value is not None})
    if place.world > 1:
        dist.init_process_group("nccl" if place.device.type == "cuda" else "gloo", timeout=timedelta(hours=12))
    failed = train_and_compare(options, settings, place, argv)
    if place.world > 1:
        dist.destroy_process_group()
    return failed


def main(argv=None):
    """The command; returns how many checks failed."""
    parser = make_parser()
    options = kernels.parse_arguments(parser, argv)
    return pile_data.obey(parser, lambda: run(options, sys.argv[1:] if argv is None else argv),
                          "the same command with --resume goes on from the last checkpoint")


if __name__ == "__main__":
    if main():
        sys.exit(1)
