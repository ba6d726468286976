"""05 · Language models: train them, measure them, let them speak

Aim: take text to trained language models, and to numbers that can be trusted, with one program
for a laptop and for many GPUs.

You will learn
  1. how to find a batch by computing: its place in the data is a function of seed and step;
  2. how one update is the work of several forward passes, and of several processes;
  3. what a checkpoint must hold, so that a run may be killed at any moment;
  4. how every token is scored once and with enough context, and what the mean hides;
  5. bits per byte: where a model stands beside a program that only looks up repetitions.

Equations
  order           sequence i of a pass over the data begins at token T · ((a·i + b) mod N) + c
  learning rate   rises to lr in `warmup` steps, then falls: lr · (1 + cos(π · progress)) / 2,
                  where progress goes from 0 to 1
  perplexity      exp(mean of −ln p(x_t | x_<t))
  bits per byte   Σ −ln p(x_t | x_<t) / ln 2 / bytes of the text                 [3, section 3.1]

Letters: B batch, T length of a training sequence, V size of the vocabulary, N sequences in one
  pass over the data, i sequence of a pass; a, b, c whole numbers, see below; lr the highest
  learning rate; p(x_t | x_<t) the model's probability of token x_t after all those before it.

References
  [1] Aksenov et al., Linear Transformers with Learnable Kernel Functions are Better In-Context
      Models, ACL 2024, arXiv 2402.10644.
  [2] Arora et al., Zoology: Measuring and Improving Recall in Efficient Language Models,
      ICLR 2024, arXiv 2312.04927.
  [3] Gao et al., The Pile: An 800GB Dataset of Diverse Text for Language Modeling,
      arXiv 2101.00027.

Run: python 05_train_pile.py                 (3 minutes on two cores, nothing to download)
     python 05_train_pile.py --data FOLDER --set steps=1000 lr=0.002 --out runs/longer
     torchrun --nproc-per-node 8 05_train_pile.py --preset paper --data FOLDER --out runs/paper
"""

# %%
import math
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from rebased import files, kernels, lesson, pile_report, pile_run, pile_settings  # 01_kernels.py
from rebased import model as models  # 03_model.py
from rebased.lesson import Refusal
from rebased.pile_run import GO_ON, RANK, WORLD
from rebased.tokens import first_documents, print_subsets, refuse_cut, subsets_of

# %% [markdown]
# ## What is trained
#
# Everything that decides what is trained and how it is measured is a *setting*;
# `rebased/pile_settings.py` says what each one means. The values below are those of a run of a few
# minutes. `--set steps=400 lr=0.002` changes some of them, `--preset paper` takes the paper's [1,
# App. C].

# %%
if __name__ == "__main__":
    mixers = ["attention", *kernels.KERNELS]
    options, settings, device, source = lesson.obey(lambda: pile_run.start(mixers), GO_ON)
    pile_settings.show(settings)

# %% [markdown]
# ## The data: one long row of tokens
#
# Without `--data` the text is what comes with Python: its library's source, the tests of it, and
# its help texts. `--data FOLDER` takes files in the Pile's format.
#
# Text becomes tokens once, on the disk: all training documents one after the other in one file,
# with a token behind each that says "the end". From then on the file is a *memory map*: an array
# whose pages are read from the disk when they are used. Nothing is loaded, however large it is.
# Our tokens are single bytes unless another tokenizer is asked for.
#
# A hash of its text decides whether a document is for validation. So a document never changes
# side, however files are ordered or added, and copies of it go the same way.
#
# The table below has a row for each subset; its last column is what zlib needs for the validation
# text, in bits per byte. zlib knows no language: it replaces what occurred in the last 32 KB by a
# reference. A model that needs more has not yet learned as much as looking up repetitions.
# (`rebased/pile_data.py` and `rebased/tokens.py` read files that may be broken, and say what they
# could not use.)

# %%
if __name__ == "__main__":
    data = lesson.obey(lambda: pile_run.prepare_data(options, settings), GO_ON)
    lesson.obey(lambda: print_subsets(data), GO_ON)

# %% [markdown]
# ## The order of the data is a formula
#
# A training sequence is T tokens and the one after them, for every token is to predict the next.
# Cut the row into N sequences. In which order? Their own order would show a model one topic for
# hours. A shuffled list of all sequences would have to be stored (for the Pile some hundred million
# numbers) or made again at every start, and a checkpoint would have to say how far one is in it.
#
# A formula needs neither. For whole numbers a and N without a common divisor, $(a \cdot i + b)
# \bmod N$ takes every value below N exactly once as i goes from 0 to N − 1. With a near N/1.618
# neighbours in a batch come from far apart. b and c are drawn anew for each pass: with another b it
# begins elsewhere in the same cycle, and with another c it cuts the row at other places.

# %%
def sequence_start(n, num_tokens, T, seed):
    """Where sequence n of a run begins in the row. Raises Refusal if the row is too short."""
    N = num_tokens // T - 1  # one less than fit: room for the shift c and the token after the last
    if N < 1:
        raise Refusal(f"{num_tokens:,} tokens are too few for sequences of {T}; lower seq_len")
    epoch, i = divmod(n, N)  # which pass, and which sequence of it
    a = max(1, int(N * (math.sqrt(5) - 1) / 2))
    while math.gcd(a, N) > 1:
        a += 1
    random = np.random.default_rng([seed, epoch])
    b = int(random.integers(N))
    c = int(random.integers(T))
    return T * ((a * i + b) % N) + c


def show_the_order(text="here every character is a token of the row", T=8):
    """Two passes over a short row."""
    N = len(text) // T - 1
    print(f"{text!r}: {len(text)} tokens, T = {T}, so N = {N}\n")
    for n in range(2 * N):
        first = sequence_start(n, len(text), T, seed=0)
        sequence = text[first : first + T]
        following = text[first + 1 : first + T + 1]
        print(f"pass {n // N}, i = {n % N}: token {first:2}, {sequence!r} predicts {following!r}")
    print()


def check_a_pass_visits_every_sequence_once():
    """Sequences of one pass do not overlap, and together they are all of it."""
    N = 10_000 // 64 - 1
    for epoch in range(3):
        sequences = range(epoch * N, (epoch + 1) * N)
        starts = sorted(sequence_start(n, 10_000, 64, seed=3) for n in sequences)
        assert starts == [starts[0] + 64 * i for i in range(N)]
        assert starts[-1] + 64 < 10_000


if __name__ == "__main__":
    show_the_order()
    lesson.check(check_a_pass_visits_every_sequence_once)

# %% [markdown]
# So the number of a step says all about the place in the data. If several processes share the work,
# each takes its part of the batch. It cuts that part into *micro-batches*: what fits into memory at
# once.

# %%
def micro_batches(tokens, settings, step, rank=RANK, world=WORLD):
    """What process `rank` computes in this step: int64 tensors (micro_batch, T + 1).

    The last of them has fewer rows where micro_batch does not divide its part of the batch.
    """
    T = settings.seq_len
    in_batch = settings.batch_tokens // T
    mine = in_batch // world
    first = step * in_batch + rank * mine
    rows = []
    for n in range(first, first + mine):
        begin = sequence_start(n, len(tokens), T, settings.seed)
        rows.append(tokens[begin : begin + T + 1])
    batch = torch.from_numpy(np.stack(rows).astype(np.int64))  # (mine, T + 1)
    return batch.split(settings.micro_batch)

# %% [markdown]
# ## The models
#
# The paper's models of 150 million parameters stand in 03. The laptop's are the same made small:
# two times a gated convolution and the mixer that is compared, in four heads. Softmax has more
# weights in its projections and gets a smaller MLP, so that all are of one size.

# %%
def laptop_config(mixer, vocab_size):
    """Four layers as in `models.pile_config`, 0.725 million parameters with 256 tokens."""
    mlp = 235 if mixer == "attention" else 256
    layers = ("gated_conv", mixer) * 2
    return models.ModelConfig(layers, vocab_size, d_model=128, heads=4, norm="rms", mlp=mlp)


def model_config(mixer, settings, vocab_size):
    """The ModelConfig of a mixer under these settings."""
    if settings.model == "laptop":
        return laptop_config(mixer, vocab_size)
    return replace(models.pile_config(mixer), vocab_size=vocab_size)


def make_model(mixer, settings, vocab_size, device="cpu"):
    """A model before its first step: from one seed the same weights in every process."""
    torch.manual_seed(settings.seed)
    return models.LanguageModel(model_config(mixer, settings, vocab_size)).to(device)


if __name__ == "__main__":
    for mixer in options.mixers:
        count = models.count_parameters(model_config(mixer, settings, data.vocabulary.size))
        print(f"{mixer:20}{count:12,} parameters")
    print()

# %% [markdown]
# ## The optimiser
#
# AdamW, with weight decay on matrices only: a matrix that can do with smaller entries should, but
# the scale of a norm, a bias, γ and β have no reason to be near zero. The embedding is a matrix and
# is decayed. (04 makes no such difference: there γ and β are decayed, too.)
#
# The learning rate rises for some steps, because Adam's averages over the first few gradients are
# poor, and then falls along half a cosine to 0.

# %%
def make_optimizer(model, settings):
    """AdamW with decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]  # and convolutions, (d, 1, 3)
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), fused=True)


def learning_rate(step, settings):
    """Of the step with this number, from 0."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.lr * (1 + math.cos(math.pi * progress)) / 2


if __name__ == "__main__":
    shown = [settings.steps * i // 6 for i in range(6)] + [settings.steps - 1]
    print("step           " + "".join(f"{step:>9,}" for step in shown))
    rates = [learning_rate(step, settings) for step in shown]
    print("learning rate  " + "".join(f"{rate:9.1e}" for rate in rates) + "\n")

# %% [markdown]
# ## One update
#
# The loss is the mean of −ln p over all tokens of the batch. A mean may be taken in parts: it is
# the sum of the means of the micro-batches, each times its share of the batch. So is its gradient,
# and PyTorch *adds* gradients until they are set to zero. That is all there is to gradient
# accumulation.

# %%
def next_token_losses(model, tokens):
    """−ln p of every token but the first, given those before it: tokens (B, T + 1) -> (B, T).

    On a GPU the model computes in bfloat16 where that is safe; the loss itself is at least float32.
    """
    device = next(model.parameters()).device
    tokens = tokens.to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        logits = model(tokens[:, :-1])  # (B, T, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    following = tokens[:, 1:]  # (B, T)
    # Flat, because over the middle of three dimensions PyTorch takes nearly three times as long.
    losses = F.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="none")
    return losses.view_as(following)


def add_gradients(model, parts, before_the_last=nullcontext):
    """Leave the gradient of the mean loss over these micro-batches in the parameters.

    before_the_last: makes a context for every part but the last; the next section needs one.
    Returns the loss.
    """
    sequences = sum(len(part) for part in parts)
    total = 0.0
    for i, part in enumerate(parts):
        last = i + 1 == len(parts)
        context = nullcontext() if last else before_the_last()
        with context:
            loss = next_token_losses(model, part).mean() * (len(part) / sequences)
            loss.backward()
        total = total + loss.detach()
    return total


def check_accumulated_gradients_are_those_of_the_batch():
    """Four sequences in micro-batches of 1, 3 and 4: the gradient of the mean, within 1e-9."""
    torch.manual_seed(0)
    model = models.LanguageModel(laptop_config("rebased", 256)).double()
    batch = torch.randint(256, (4, 33))
    next_token_losses(model, batch).mean().backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    for size in (1, 3, 4):
        model.zero_grad()
        add_gradients(model, batch.split(size))
        found = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert (found - expected).norm() < 1e-9 * expected.norm()


if __name__ == "__main__":
    lesson.check(check_accumulated_gradients_are_those_of_the_batch)

# %% [markdown]
# ## Several processes
#
# `torchrun` starts several processes of this program and gives each a number, its *rank*. Started
# alone, the program is process 0 of 1. Each process has a GPU of its own, or some cores; only the
# first prints, logs and measures (`rebased/pile_run.py` sees to that).
#
# Each has all weights and its own part of the batch. `DistributedDataParallel` wraps the model:
# during the backward pass it averages the gradients of all processes. That average is the gradient
# of the whole batch only because the parts are equally long; so a number of processes that does not
# divide the batch is refused. All began with the same weights and make the same update, and stay
# the same. Of several micro-batches only the last needs to average: `no_sync` is the context that
# holds it back in those before.
#
# Are two processes one? Up to rounding: a sum in another order differs by about 1e-7. In Based and
# softmax the loss still agrees to 1e-6 after 50 steps. In ReBased it differs by 1e-3 after 25,
# probably because the gradient of a nearly vanishing normaliser is large. So a test demands less of
# two processes than equality. The gradient of the first step must be that of one process within
# 1e-5, and so must ReBased's first three losses. The mean of its losses over 50 steps must differ
# by less than the standard deviation of that mean over four seeds.

# %%
def make_ready(model, settings):
    """The model as it is trained: compiled or with less memory if so set, in several processes."""
    model = pile_run.compile_and_recompute(model, settings)
    if WORLD > 1:
        model = DistributedDataParallel(model)
    return model

# %% [markdown]
# The step as a whole. A rare batch has a gradient many times as long as usual and would undo the
# work of others, so a gradient is cut to a length of at most `clip`.

# %%
def train_step(model, optimizer, data, settings, step):
    """The update with this number. Returns its record, which becomes a line of the log."""
    begin = time.perf_counter()
    lr = learning_rate(step, settings)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    refuse_cut(data.train)
    parts = micro_batches(data.train, settings, step)
    if WORLD > 1:
        loss = add_gradients(model, parts, before_the_last=model.no_sync)
        dist.all_reduce(loss)  # the sum over all processes
        loss = loss / WORLD
    else:
        loss = add_gradients(model, parts)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
    if not torch.isfinite(loss + norm):
        raise Refusal(f"step {step}: loss {loss:.3g}, gradient {norm:.3g}; lower lr. {GO_ON}")
    optimizer.step()
    rate = settings.batch_tokens / (time.perf_counter() - begin)
    return {"step": step, "loss": loss.item(), "lr": lr, "norm": norm.item(), "tokens_per_s": rate}

# %% [markdown]
# ## A checkpoint
#
# What must be kept so that a run goes on as if nothing had happened? The weights; the two averages
# that AdamW has for each weight; and the number of the next step, which is the place in the data
# and in the schedule of the learning rate. The log has one record a step, so its length is that
# number. Training draws no random numbers, or their state would belong here too. On one process the
# run then ends with the very bits of a run that was not interrupted: a test kills one ten times to
# see that.
#
# The rest says which run this was, so that another cannot go on from it by mistake. All of it is
# tensors and plain types, and to load it runs no code. It is written to a temporary file, which is
# renamed when it is complete: a kill at any moment leaves the old file or the new one. At its end
# stands a digest of everything, because `torch.load` by itself takes nine of ten files with one
# flipped bit for good.

# %%
def save_checkpoint(path, model, optimizer, log, mixer, settings, data):
    """Raises Refusal if it cannot be written; the one before is intact then."""
    content = pile_run.identity_of_run(mixer, model.config, settings, data)
    content["model"] = model.state_dict()
    content["optimizer"] = optimizer.state_dict()
    content["log"] = log
    files.save_tensors(path, content)


def restore(path, model, optimizer, mixer, settings, data):
    """Put a checkpoint back; returns the log so far. Raises Refusal for another run's."""
    found = pile_run.load_checkpoint(path)
    pile_run.refuse_another_run(path, found, mixer, settings, data)
    pile_run.refuse_what_does_not_fit(path, found, model, optimizer)
    model.load_state_dict(found["model"])
    optimizer.load_state_dict(found["optimizer"])
    return found["log"]

# %% [markdown]
# ## Training
#
# Now the loop is short. The log, a line for each step, is written anew from the checkpoint at every
# start: what a killed run had logged after its last checkpoint is computed again, and no line
# stands there twice.

# %%
def train(mixer, settings, data, folder, device="cpu", resume=False):
    """Train one model, or what is left of it. Returns the model and a record for each step."""
    path = folder / "checkpoint.pt"
    model = make_model(mixer, settings, data.vocabulary.size, device)
    optimizer = make_optimizer(model, settings)
    log = []
    if resume and path.exists():
        log = restore(path, model, optimizer, mixer, settings, data)
        print(f"{path}: goes on at step {len(log)}")
    ready = make_ready(model, settings)
    with pile_run.keeping_log(folder, mixer, log, settings.steps) as tell:
        for step in range(len(log), settings.steps):
            record = train_step(ready, optimizer, data, settings, step)
            log.append(record)
            tell(record)
            due = (step + 1) % settings.save_every == 0 or step + 1 == settings.steps
            if due and RANK == 0:
                save_checkpoint(path, model, optimizer, log, mixer, settings, data)
    return model.eval(), log


def train_all(options, settings, data, device):
    """{mixer: (model, log)}, one after the other. Raises Refusal if --out holds another run."""
    trained = {}
    with pile_run.own_folder(options) as out:
        for mixer in options.mixers:
            folder = out / mixer
            trained[mixer] = train(mixer, settings, data, folder, device, options.resume)
    return trained


if __name__ == "__main__":
    trained = lesson.obey(lambda: train_all(options, settings, data, device), GO_ON)
    pile_run.only_the_first_goes_on()

# %% [markdown]
# ## What they say
#
# Each model continues a prompt, drawing one token after the other. A temperature of 0.7 makes the
# likely likelier. After half a million of the 6 million training bytes one should expect spelling,
# not sense. (`experiments/pile_sample.py` continues your own prompt from a checkpoint, and keeps
# the state of a document that was read once.)

# %%
def sample(model, vocabulary, prompt, length=160, temperature=0.7):
    """The prompt with up to `length` tokens added, fewer if the model ends the document."""
    ids = [vocabulary.separator] + vocabulary.encode(prompt)[0].tolist()
    begin = torch.tensor([ids], device=model.embedding.weight.device)
    for token in models.generate(model, begin, length, temperature):
        if token.item() == vocabulary.separator:
            break
        ids.append(token.item())
    return vocabulary.decode(ids[1:])


if __name__ == "__main__":
    for mixer, (model, _) in trained.items():
        torch.manual_seed(0)
        print(f"{mixer}:")
        for line in sample(model, data.vocabulary, "def ").splitlines():
            print(f"  | {lesson.printable(line)}")
    print()

# %% [markdown]
# ## Every token scored once
#
# The validation text is longer than the T tokens that a model was trained with. Cutting it into
# pieces of T would ask for the first tokens of each without context. So windows of T tokens begin
# every T/2, and of each only those tokens count that no window before has scored. All but the first
# window's are then predicted from T/2 tokens or more. A context may reach over the end of a
# document, as it does in training. Below, every row is a window: `.` marks context only, `#` marks
# the tokens whose next token is scored.

# %%
def scored_windows(total, T):
    """Yields (begin, first) of windows of T tokens: those from `first` to begin + T are scored."""
    begin = 0
    done = 0
    while done < total:
        begin = max(0, min(begin, total - T))
        yield begin, done
        done = min(begin + T, total)
        begin += max(1, T // 2)


def check_every_token_is_scored_once():
    """Windows of any size score each token once, with T/2 tokens of context or more."""
    for total in (1, 7, 8, 9, 31, 100):
        for T in (1, 2, 8, 16):
            T = min(T, total)
            covered = []
            for begin, first in scored_windows(total, T):
                assert begin == 0 or first - begin >= T // 2
                covered += range(first, begin + T)
            assert covered == list(range(total)), (total, T)


if __name__ == "__main__":
    for begin, first in scored_windows(total=30, T=12):
        print("  " + " " * begin + "." * (first - begin) + "#" * (begin + 12 - first))
    print()
    lesson.check(check_every_token_is_scored_once)

# %% [markdown]
# ## Which tokens could be recalled
#
# The mean loss mixes two abilities: to know the language, and to look up what the context has said.
# The second is what linear attention is short of, and it shows on tokens that the context could
# tell. The paper calls them *AR tokens* (associative recall) and prints their perplexity apart [1,
# Table 2], but not how it chose them. So we measure in three ways, and say beside each which share
# of the tokens it takes:
#
# - `token`: the token occurred before in the context. For words; of single bytes nearly all have.
# - `bigram`: it did so behind the same token as now, so that a look-up could know it [2].
# - `rare`: and that pair is rare in the training text, so that knowing the language does not help:
#   it occurs there at most 1,250 times [2].
#
# 1,250 is a count, whatever the text: [2] chose it for the Pile in tokens of GPT-2. There are few
# different pairs of *bytes*: 7,170 in the 6 million training bytes that come with Python 3.11. Only
# 543 of them occur more often than that, but these fill 90 % of the text. So `rare` takes a small
# share of the laptop's tokens. The picture below leaves it out, for it needs the training text.

# %%
DEFINITIONS = ("token", "bigram", "rare")
RARE = 1250
COUNTED = 50_000_000  # tokens, from the beginning of the training text, whose pairs are counted


def bigram_keys(tokens):
    """tokens (n,) -> (n − 1,), one number for each pair of neighbours."""
    tokens = tokens.astype(np.int64)
    return tokens[:-1] * 2**32 + tokens[1:]


def common_bigrams(tokens):
    """The keys of the pairs that occur more than RARE times in the first COUNTED tokens."""
    keys, counts = np.unique(bigram_keys(tokens[:COUNTED]), return_counts=True)
    return keys[counts > RARE]


def repeated(values):
    """values (n,) -> bool (n,): where a value occurs that has occurred before."""
    mask = np.ones(len(values), dtype=bool)
    mask[np.unique(values, return_index=True)[1]] = False  # the first place of each value
    return mask


def recall_mask(context, definition="bigram", common=()):
    """Tokens (n,) of one context -> bool (n,): which of them are AR tokens.

    common: what `common_bigrams` found in the training text, for the definition "rare".
    """
    if definition == "token":
        return repeated(context)
    keys = bigram_keys(context)  # (n − 1,)
    mask = repeated(keys)
    if definition == "rare":
        mask = mask & ~np.isin(keys, common)
    return np.append(False, mask)  # a pair belongs to its second token; the first has none


def show_recall(text="the cat sat on the cat"):
    """A sentence, and below it a mark for each AR token."""
    context = np.frombuffer(text.encode(), dtype=np.uint8)
    print(f"{'':10}{text}")
    for definition in ("token", "bigram"):
        mask = recall_mask(context, definition)
        print(f"{definition:10}" + "".join("^" if is_ar else " " for is_ar in mask))
    print()


if __name__ == "__main__":
    show_recall()

# %% [markdown]
# With windows and masks, every token of the validation text has one loss, and for each definition a
# yes or no.

# %%
@torch.no_grad()
def score(model, stream, T, common):
    """Losses (n,) of all tokens in stream (n + 1,) but the first, and {definition: mask (n,)}."""
    total = len(stream) - 1
    T = min(T, total)
    losses = np.zeros(total)
    masks = {name: np.zeros(total, dtype=bool) for name in DEFINITIONS}
    for begin, first in tqdm(list(scored_windows(total, T)), desc="evaluate", leave=False):
        new = slice(first - begin, T)  # in this window; of the whole text, first to begin + T
        window = stream[begin : begin + T + 1].astype(np.int64)
        found = next_token_losses(model, torch.from_numpy(window).unsqueeze(0))[0]  # (T,)
        losses[first : begin + T] = found[new].cpu().numpy()
        for name in DEFINITIONS:
            mask = recall_mask(window, name, common)[1:]  # (T,), of the tokens that are predicted
            masks[name][first : begin + T] = mask[new]
    return losses, masks

# %% [markdown]
# ## Numbers that can be compared
#
# *Perplexity* is exp of the mean loss: a model of perplexity 7 is as unsure, on the average, as if
# it chose among 7 tokens. It depends on the vocabulary, for a longer token is harder to guess.
# *Bits per byte* do not: all the losses of a text, in bits, divided by the bytes of the text [3].
# An arithmetic coder turns these probabilities into a file of that size (beside the model, whose
# size is not counted, as zlib's program is not). So zlib is measured by the same number. The end of
# a document is no byte of it and does not count.

# %%
def bits_per_byte(losses, num_bytes):
    """Of the losses (n,) in nats of all tokens of a text. [3, section 3.1]"""
    return losses.sum() / math.log(2) / max(1, num_bytes)


def perplexity(losses):
    """exp of the mean; None without a token."""
    if len(losses) == 0:
        return None
    return math.exp(min(700.0, losses.mean()))  # exp overflows above


def check_no_opinion_is_eight_bits():
    """A model that finds all 256 bytes equally likely needs 8 bits per byte."""
    model = models.LanguageModel(laptop_config("rebased", 256))
    torch.nn.init.zeros_(model.embedding.weight)
    losses, _ = score(model, np.arange(300) % 256, 64, common=())
    assert abs(bits_per_byte(losses, 299) - 8) < 1e-6


if __name__ == "__main__":
    lesson.check(check_no_opinion_is_eight_bits)

# %% [markdown]
# All numbers of one model are then its perplexities on the slices, its bits per byte on the
# subsets, and its loss by the position in the context.

# %%
def evaluate(model, data, settings, common):
    """All numbers of one model, as plain types. common: see `recall_mask`."""
    stream, docs = first_documents(data, settings.eval_tokens)
    losses, masks = score(model, stream, settings.seq_len, common)
    subsets = subsets_of(docs, data)
    numbers = pile_report.collect(losses, masks, subsets, perplexity, bits_per_byte)
    losses_of = partial(next_token_losses, model)
    length = settings.eval_length
    numbers["by_position"] = pile_report.loss_by_position(losses_of, stream, length)
    return numbers


def measure(trained, settings, data):
    """A row of numbers for each model."""
    rows = []
    refuse_cut(data.train)
    common = common_bigrams(data.train)
    for mixer, (model, log) in trained.items():
        row = {"mixer": mixer, "parameters": models.count_parameters(model.config)}
        row.update(pile_report.about_training(settings, model.config, log))
        row.update(evaluate(model, data, settings, common))
        rows.append(row)
    return rows

# %% [markdown]
# ## The tables
#
# Look for three things. Which models are still above zlib (`>`)? How much lower is the perplexity
# of the tokens that the context could tell (`AR`) than that of the others? And do the models differ
# more there than in the mean? That is where linear attention should fall behind softmax.

# %%
if __name__ == "__main__":
    rows = lesson.obey(lambda: measure(trained, settings, data), GO_ON)
    pile_report.print_tables(rows)
    pile_report.print_reading(rows)

# %% [markdown]
# ## What they do not say
#
# - **No ranking.** 120 steps from one seed: another seed moves a loss, too. Losses as close as
#   these rank nothing. To compare kernels, train longer and with several seeds.
# - **Little about recall.** A model above zlib does not yet look up what zlib finds. AR tokens of
#   `token` and `bigram` are easier also because they are frequent everywhere, and whoever knows the
#   language knows them. `rare` leaves these out.
# - **Little about long contexts.** A context of 512 bytes is about a dozen lines of text.
# - **Nothing about the paper's models**, which have 200 times the parameters and see the Pile.

# %% [markdown]
# ## The figure
#
# Above: the training loss against the tokens seen. Below: the loss of the validation text by the
# position in the context, in contexts longer than those of training. A model that uses its context
# gets better along the line; one that cannot go beyond the trained length gets worse behind it. The
# rows of numbers are kept, with the command, the commit and the machine that made them.

# %%
if __name__ == "__main__":
    path = pile_run.folder_of(options) / "results.jsonl"
    rows = lesson.obey(lambda: pile_run.keep_rows(path, rows, source, device), GO_ON)
    pile_report.draw(rows, options.figure)
    lesson.finish()
