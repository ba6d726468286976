"""05 · The Pile: train, evaluate and sample language models with ReBased, Based and softmax attention

Aim: take text files to trained models and honest numbers, with one program for a laptop and for many GPUs.

You will learn
  1. what lies between files and a batch: lines that are broken, a vocabulary, a split that stays where it is;
  2. a training loop that can be killed at any moment and goes on as if nothing had happened;
  3. what perplexity hides: tokens that could be copied from the context against those that could not;
  4. decoding at constant cost: read a document once, keep its state, continue it many times.

Equations
  loss             mean of −ln p(x_t | x_<t) over all tokens, separators between documents too
  perplexity       exp(loss); over a slice of the tokens: exp of the loss of that slice
  bits per byte    (tokens / bytes) · loss / ln 2, without separators: comparable between vocabularies      [G]
  AR tokens        those that recall could predict: x_t, or (x_{t−1}, x_t), occurred earlier in the context  [P, Z]
  learning rate    lr · min(t/warmup, 1), then half a cosine to 0

Letters: as in 03; T the length of a training sequence, V the size of the vocabulary.

References: [P] as in 01, Table 2 and Appendix C; [Z] Arora et al., Zoology, arXiv 2312.04927;
  [G] Gao et al., The Pile, arXiv 2101.00027, section 3.1.

Run: python 05_train_pile.py                        (4 minutes on two free cores, nothing to download)
     python 05_train_pile.py --data FOLDER          (the Pile's files: .jsonl, .jsonl.zst, .jsonl.gz)
     python 05_train_pile.py --sample "import " --checkpoint runs/pile/rebased/checkpoint.pt
     torchrun --nproc-per-node 8 05_train_pile.py --preset paper --data FOLDER --mixers rebased --out runs/paper
"""
# %%
import argparse
import gzip
import hashlib
import io
import json
import math
import os
import platform
import pydoc
import re
import subprocess
import sys
import sysconfig
import time
import zlib
from collections import Counter
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm

kernels = import_module("01_kernels")
linear_attention = import_module("02_linear_attention")
models = import_module("03_model")


class Refusal(Exception):
    """What the user can mend. `main` prints it as one line and exits with status 2."""


def optional(name, purpose):
    """Import a library that only some commands need."""
    try:
        return import_module(name)
    except ImportError:
        raise Refusal(f"{purpose} needs {name}: pip install {name}") from None

# %% Settings: one dataclass, one command-line option for each field, two presets
def option(default, help):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Settings:
    """Everything that decides what is trained and how it is measured. Raises Refusal for what cannot be run."""

    model: str = option("laptop", "laptop: 0.7 M parameters; paper: the paper's 150 M")
    tokenizer: str = option("bytes", "bytes, gpt2 or gpt-neox")
    valid_share: float = option(0.05, "share of the documents kept for validation")
    seq_len: int = option(512, "tokens in a sequence")
    batch_tokens: int = option(4096, "tokens in a global batch, whatever the number of processes")
    micro_batch: int = option(8, "sequences in one forward pass of one process")
    steps: int = option(120, "batches to train on")
    warmup: int = option(20, "steps of linear warm-up")
    lr: float = option(4e-3, "highest learning rate")
    weight_decay: float = option(0.1, "of matrices; vectors have none")
    clip: float = option(1.0, "largest norm of the gradient")
    seed: int = option(0, "of the initial weights and the order of the data")
    save_every: int = option(1000, "steps between checkpoints")
    eval_tokens: int = option(150_000, "validation tokens to score (whole documents)")
    eval_length: int = option(2048, "longest context of the loss by position")

    def __post_init__(self):
        for name in ("seq_len", "batch_tokens", "micro_batch", "steps", "save_every", "eval_tokens", "eval_length"):
            if getattr(self, name) < 1 + (name == "seq_len"):
                raise Refusal(f"--{name.replace('_', '-')} must be at least {1 + (name == 'seq_len')}, "
                              f"got {getattr(self, name)}")
        if self.batch_tokens % self.seq_len:
            raise Refusal(f"--batch-tokens {self.batch_tokens} is no multiple of --seq-len {self.seq_len}")
        if not 0 < self.valid_share < 1 or not 0 < self.lr < math.inf or self.clip <= 0:
            raise Refusal("--valid-share must lie between 0 and 1, --lr and --clip must be positive")
        if self.warmup < 0 or self.weight_decay < 0 or self.seed < 0:
            raise Refusal("--warmup, --weight-decay and --seed must not be negative")
        for name, allowed in (("model", ("laptop", "paper")), ("tokenizer", ("bytes", "gpt2", "gpt-neox"))):
            if getattr(self, name) not in allowed:
                raise Refusal(f"--{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")


# The paper's settings [P App. C]. Its "effective batch 1024" has no unit; taken as sequences it is 4.2 M tokens.
PRESETS = {
    "laptop": {},
    "paper": dict(model="paper", tokenizer="gpt-neox", valid_share=0.001, seq_len=4096, batch_tokens=1024 * 4096,
                  steps=20_000, warmup=200, lr=1e-3, save_every=500, eval_tokens=2_000_000, eval_length=16_384),
}

# What may differ when a run is continued: how the work is cut and saved, not what is learned.
FREE = {"micro_batch", "save_every", "eval_tokens", "eval_length"}


def laptop_config(mixer, vocab_size):
    """Four layers, the paper's Pile model made small; softmax has a smaller MLP, so that all sizes are equal."""
    mlp = 235 if mixer == "attention" else 256
    return models.ModelConfig(("gated_conv", mixer) * 2, vocab_size, 128, heads=4, norm="rms", mlp=mlp)


def model_config(mixer, settings, vocab_size):
    """The ModelConfig of a mixer under these settings."""
    if settings.model == "laptop":
        return laptop_config(mixer, vocab_size)
    config = asdict(models.pile_config(mixer))
    return models.ModelConfig(**config | {"vocab_size": vocab_size})

# %% Reading the Pile, in every layout in which it is passed around
# A line is {"text": ..., "meta": {"pile_set_name": ...}}. Mirrors say `contents` and `metadata`, write the metadata as
# a JSON string, put a list into it or leave it out. And files of this size do arrive broken. The rule: a line that
# cannot be used is skipped, counted and named with file and line; a compressed file that ends too early gives what
# came before; blank lines are nothing. Reading only stops where there is not one document.
SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz")
LONGEST_LINE = 64 * 2**20  # bytes; longer lines are passed over without being held


class Damaged(Exception):
    """A compressed stream cannot be read further."""


class Problems:
    """What could not be used: every case to `file`, the first of each kind to the screen, and the counts."""

    def __init__(self, counts=(), file=None):
        self.counts, self.file = Counter(dict(counts)), file

    def add(self, path, line, reason):
        self.counts[reason] += 1
        if self.file:
            self.file.write(f"{path}:{line}: {reason}\n".encode())
        if self.counts[reason] <= 3:
            more = "; further ones are only counted" if self.counts[reason] == 3 else ""
            tqdm.write(f"skipped {path}:{line}: {reason}{more}", file=sys.stderr)


def find_files(paths):
    """Files and folders -> a list of files, those of a folder in the order of their names. Raises Refusal."""
    files = {}
    for path in map(Path, paths):
        if not path.exists():
            raise Refusal(f"{path}: no such file or folder")
        found = sorted(p for p in path.rglob("*") if p.name.endswith(SUFFIXES)) if path.is_dir() else [path]
        if not found:
            raise Refusal(f"{path}: no {', '.join(SUFFIXES)} files in this folder")
        files |= dict.fromkeys(found)
    for path in files:
        if not path.name.endswith(SUFFIXES):
            raise Refusal(f"{path}: cannot read this kind of file; convert it to one of {', '.join(SUFFIXES)}")
    return list(files)


def zst_pieces(raw):
    """Decompress one frame after another. 2 KB at a time: even the most compressed input stays below 64 MB a piece."""
    zstandard = optional("zstandard", "reading .zst files")
    decoder, frame, rest = zstandard.ZstdDecompressor(max_window_size=2**31), None, b""
    while chunk := rest or raw.read(2048):
        frame = frame or decoder.decompressobj()
        try:
            yield frame.decompress(chunk)
        except zstandard.ZstdError:
            raise Damaged("the compressed data is damaged from here on") from None
        frame, rest = (None, frame.unused_data) if frame.eof else (frame, b"")
    if frame:
        raise Damaged("the file ends in the middle of its compressed data")


def pieces(path, progress):
    """The decompressed bytes of a file, piece by piece; `progress` is told the bytes read. Raises Damaged."""
    with open(path, "rb") as raw:
        stream, at = gzip.open(raw) if path.suffix == ".gz" else raw, 0
        try:
            for piece in zst_pieces(raw) if path.suffix == ".zst" else iter(lambda: stream.read1(2**20), b""):
                yield piece
                progress(raw.tell() - at)
                at = raw.tell()
        except EOFError:
            raise Damaged("the file ends in the middle of its compressed data") from None
        except (gzip.BadGzipFile, zlib.error):
            raise Damaged("the compressed data is damaged from here on") from None


def lines(stream):
    """Pieces of bytes -> (line number from 1, line), with None for a line over LONGEST_LINE, which is never held."""
    number, parts, size = 1, [], 0
    for piece in stream:
        *ended, rest = piece.split(b"\n")
        for part in ended:
            yield number, b"".join([*parts, part]) if size + len(part) <= LONGEST_LINE else None
            number, parts, size = number + 1, [], 0
        size += len(rest)
        parts = [*parts, rest] if size <= LONGEST_LINE else []
    if size:
        yield number, b"".join(parts) if size <= LONGEST_LINE else None


def first(x):
    """The first entry of a list (of lists ...), None of an empty one; what is no list stays as it is."""
    return x if not isinstance(x, list) else first(x[0]) if x else None


def subset_of(meta):
    """The name of the subset in the metadata, whichever way it is written; "unknown" without one."""
    try:
        meta = first(json.loads(meta) if isinstance(meta, str) else meta)
    except (ValueError, RecursionError):
        return "unknown"
    name = first(meta.get("pile_set_name")) if isinstance(meta, dict) else None
    return name if isinstance(name, str) and name else "unknown"


def parse(line):
    """A line of bytes -> (text, subset). Raises ValueError with the reason if it holds no document."""
    if line is None:
        raise ValueError(f"a line of more than {LONGEST_LINE / 2**20:.0f} MB")
    try:
        item = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError("invalid UTF-8") from None
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if not isinstance(item, dict) or not ("text" in item or "contents" in item):
        raise ValueError("no `text` or `contents`")
    text = item["text"] if "text" in item else item["contents"]
    if not isinstance(text, str) or not text:
        raise ValueError("an empty document" if text == "" else "the text is no string")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair, which is no text") from None
    return text, subset_of(item.get("meta", item.get("metadata")))


def documents(files, problems, start=(0, 0), progress=lambda n: None):
    """Yields ((file, line), text, subset) for what comes after place `start`."""
    for i in range(start[0], len(files)):
        number = 0
        try:
            for number, line in lines(pieces(files[i], progress)):
                if (i, number) <= tuple(start) or (line is not None and not line.strip()):
                    continue
                try:
                    document = parse(line)
                except ValueError as error:
                    problems.add(files[i], number, str(error))
                else:
                    yield (i, number), *document
            if number == 0:
                problems.add(files[i], 1, "an empty file")
        except Damaged as error:
            problems.add(files[i], number + 1, str(error))


def read_documents(paths, problems=None):
    """Files or folders -> an iterator of (text, subset). Problems are counted in `problems`. Raises Refusal."""
    for _, text, subset in documents(find_files(paths), Problems() if problems is None else problems):
        yield text, subset

# %% Text that comes with every Python
# Without --data: the standard library's sources and the help texts built into the interpreter, written down once in
# the Pile's format, with subsets. Files of more than 16 KB stay out, so that a short validation has many documents.
# Another Python version has other text: compare numbers within one version only.
def library_documents():
    """Yields (text, subset): Library and Tests from source files, Help from the interpreter."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts  # pydoc_data holds the help texts below, encodings tables of numbers
        if "site-packages" in parts or parts[0] in ("pydoc_data", "encodings") or path.stat().st_size > 2**14:
            continue
        try:
            yield path.read_bytes().decode(), "Tests" if {"test", "tests", "idle_test"} & set(parts) else "Library"
        except UnicodeDecodeError:  # the tests hold files that are wrong on purpose
            continue
    for text in import_module("pydoc_data.topics").topics.values():
        yield text, "Help"
    builtins = import_module("builtins")
    for name in sorted(name for name in dir(builtins) if callable(getattr(builtins, name))):
        text = pydoc.plain(pydoc.render_doc(getattr(builtins, name)))
        yield re.sub(r" at 0x[0-9a-fA-F]+", "", text), "Help"


def write_library(path):
    """Write those documents to a .jsonl file, in an order that only their content decides."""
    found = {hashlib.sha256(text.encode()).digest(): (text, name) for text, name in library_documents() if text}
    rows = [json.dumps({"text": text, "meta": {"pile_set_name": name}}) for _, (text, name) in sorted(found.items())]
    write_atomically(path, "\n".join(rows).encode() + b"\n")

# %% Files that are whole or not there
def write_atomically(path, data):
    """Write bytes under another name, flush them to the disk, then rename: whoever looks sees the old or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        kept = "; the one before is intact" if path.exists() else ""
        raise Refusal(f"cannot write {path}: {error.strerror}{kept}") from None

# %% Vocabularies
# Bytes need no file and no training, and their loss is bits per byte but for a factor. Byte 0 ends a document; what
# zero bytes a text has are dropped and counted. BPE ends it with <|endoftext|>, and rounds V up to a multiple of 8.
class Bytes:
    """256 tokens. encode(text) -> (ids, bytes that the ids stand for, zero bytes dropped)."""

    name, size, separator = "bytes", 256, 0

    def encode(self, text):
        ids = np.frombuffer(text.encode(), dtype=np.uint8)
        kept = ids[ids != 0]
        return kept, len(kept), len(ids) - len(kept)

    def decode(self, ids):
        return bytes(i for i in ids if i).decode("utf-8", "replace")


class BPE:
    """gpt2 through tiktoken or gpt-neox through tokenizers; either one from a local tokenizer.json."""

    def __init__(self, name, file=None):
        self.name = name
        try:
            if file or name == "gpt-neox":
                size = self.use_tokenizers(file)
            else:
                size = self.use_tiktoken()
        except Refusal:
            raise
        except Exception as error:  # these libraries raise whatever their network layer or parser raises
            how = "is no tokenizer.json" if file else "without network: give --tokenizer-file tokenizer.json"
            raise Refusal(f"cannot load tokenizer {name}, {file or ''} {how} ({type(error).__name__})") from None
        self.size = -(-size // 8) * 8

    def use_tokenizers(self, file):
        tokenizers = optional("tokenizers", f"tokenizer {self.name}")
        codec = tokenizers.Tokenizer
        codec = codec.from_file(str(file)) if file else codec.from_pretrained("EleutherAI/gpt-neox-20b")
        codec.encode_special_tokens = True  # "<|endoftext|>" inside a text is text
        self.to_ids = lambda text: codec.encode(text, add_special_tokens=False).ids
        self.decode = lambda ids: codec.decode(list(ids), skip_special_tokens=False)
        self.separator = codec.token_to_id("<|endoftext|>")
        if self.separator is None:
            raise Refusal(f"{file}: this tokenizer has no <|endoftext|>")
        return codec.get_vocab_size()

    def use_tiktoken(self):
        codec = optional("tiktoken", f"tokenizer {self.name}").get_encoding("gpt2")
        self.to_ids, self.decode, self.separator = codec.encode_ordinary, codec.decode, codec.eot_token
        return codec.n_vocab

    def encode(self, text):
        return np.array(self.to_ids(text), dtype=np.int64), len(text.encode()), 0


def make_vocabulary(name, file=None):
    return Bytes() if name == "bytes" else BPE(name, file)


def identity(vocabulary):
    """What must agree before tokens of one run are used in another: the ids of a probe say which tokenizer it is."""
    probe = vocabulary.encode("The Pile:\n\n    naïve 1234 <|endoftext|> 東京\t\r\n")[0].tolist()
    digest = hashlib.sha256(json.dumps(probe).encode()).hexdigest()[:16]
    return {"name": vocabulary.name, "size": vocabulary.size, "separator": vocabulary.separator, "probe": digest}

# %% Tokenised once, into a memory-mapped file
# train.bin and valid.bin hold nothing but tokens, in the smallest integer type that fits; .docs files have a row
# (start, tokens, bytes, subset) a document; manifest.json says what went in, and how far it is. It is renamed into
# place after the files are on the disk, so after an interruption everything beyond it is cut off and made again.
PARTS = ("train.bin", "valid.bin", "train.docs", "valid.docs", "problems.txt")
COMMIT = 32 * 2**20  # bytes of text between two states of the manifest


class Tokens(NamedTuple):
    """Tokenised data: two memory maps of tokens, the rows of the validation documents, the names of subsets."""

    manifest: dict
    train: np.ndarray
    valid: np.ndarray
    valid_docs: np.ndarray
    vocabulary: object


def token_type(vocab_size):
    return np.dtype(np.uint8 if vocab_size <= 2**8 else np.uint16 if vocab_size <= 2**16 else np.uint32)


def is_validation(text, share):
    """By a hash of the document itself: the same in any order, beside any other files, for every copy of it."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < share * 2**64


def prepare_tokens(folder, files, settings, vocabulary, main=True):
    """The Tokens of these files in `folder`: made, completed or, if they fit, reused. Raises Refusal if they do not.

    Under torchrun only the main process writes; the others wait for it.
    """
    wanted = {"format": 1, "tokenizer": identity(vocabulary), "valid_share": settings.valid_share,
              "sources": [[str(path), path.stat().st_size] for path in files]}
    path = folder / "manifest.json"
    while True:
        manifest = read_manifest(path, wanted)
        if manifest.get("complete"):
            return open_tokens(folder, manifest, vocabulary)
        if main:
            write_tokens(folder, manifest, files, settings, vocabulary)
        else:
            time.sleep(0.5)


def read_manifest(path, wanted):
    """The manifest at `path`, a fresh one if there is none; Refusal if it was made from or with something else."""
    if not path.exists():
        return wanted | {"complete": False, "at": [0, 0], "sizes": dict.fromkeys(PARTS, 0), "names": [],
                         "subsets": {"train": {}, "valid": {}}, "zero_bytes": 0, "problems": {}}
    try:
        manifest = json.loads(path.read_bytes())
        differs = [name for name in wanted if manifest[name] != wanted[name]]
    except (ValueError, KeyError, TypeError):
        raise Refusal(f"{path}: not a manifest of this program; choose another --tokens folder") from None
    if differs:
        old, new = (m["tokenizer"]["name"] if differs[0] == "tokenizer" else m[differs[0]] for m in (manifest, wanted))
        about = "" if differs[0] == "sources" else f" ({old}, now {new})"
        raise Refusal(f"{path.parent} was made with other {differs[0].replace('_', ' ')}{about}; "
                      "choose another --tokens folder or delete it")
    return manifest


def write_tokens(folder, manifest, files, settings, vocabulary):
    """Tokenise what the manifest does not have yet."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack, tqdm(total=sum(size for _, size in manifest["sources"]), unit="B", unit_scale=True,
                                    desc="tokenise") as bar:
        parts = {name: stack.enter_context(open(folder / name, "ab")) for name in PARTS}
        for name, file in parts.items():
            file.truncate(manifest["sizes"][name])
            file.seek(0, os.SEEK_END)
        problems, since = Problems(manifest["problems"], parts["problems.txt"]), 0
        bar.update(sum(size for _, size in manifest["sources"][: manifest["at"][0]]))
        for place, text, subset in documents(files, problems, manifest["at"], bar.update):
            since += add_document(manifest, parts, text, subset, settings.valid_share, vocabulary)
            if since > COMMIT:
                commit(folder, manifest | {"at": place, "problems": problems.counts}, parts)
                since = 0
        if not sum(row["documents"] for split in manifest["subsets"].values() for row in split.values()):
            raise Refusal(f"not one document in {', '.join(map(str, files[:3]))}{' ...' if files[3:] else ''}")
        done = {"complete": True, "at": [len(files), 0], "problems": problems.counts}
        commit(folder, manifest | done, parts)


def add_document(manifest, parts, text, subset, share, vocabulary):
    """Append one document, its separator, its row and its counts; returns its bytes."""
    split = "valid" if is_validation(text, share) else "train"
    ids, num_bytes, zeros = vocabulary.encode(text)
    dtype = token_type(vocabulary.size)
    if subset not in manifest["names"]:
        manifest["names"].append(subset)
    start = parts[f"{split}.bin"].tell() // dtype.itemsize
    row = np.array([start, len(ids), num_bytes, manifest["names"].index(subset)], dtype=np.int64)
    parts[f"{split}.bin"].write(np.append(ids, vocabulary.separator).astype(dtype).tobytes())
    parts[f"{split}.docs"].write(row.tobytes())
    counts = manifest["subsets"][split].setdefault(subset, {"documents": 0, "tokens": 0, "bytes": 0})
    for name, value in (("documents", 1), ("tokens", len(ids)), ("bytes", num_bytes)):
        counts[name] += value
    manifest["zero_bytes"] += zeros
    return num_bytes


def commit(folder, manifest, parts):
    """Files first, then the manifest that vouches for them."""
    for file in parts.values():
        file.flush()
        os.fsync(file.fileno())
    sizes = {name: file.tell() for name, file in parts.items()}
    write_atomically(folder / "manifest.json", json.dumps(manifest | {"sizes": sizes}, indent=1).encode())


def open_tokens(folder, manifest, vocabulary):
    """Map the files of a complete manifest."""
    def load(name, dtype):
        path, size = folder / name, manifest["sizes"][name]
        if not path.exists() or path.stat().st_size != size:
            raise Refusal(f"{path} does not have the {size:,} bytes of its manifest; delete {folder} and start again")
        return np.memmap(path, dtype, "r") if size else np.zeros(0, dtype)

    dtype = token_type(vocabulary.size)
    docs = load("valid.docs", np.dtype(np.int64)).reshape(-1, 4)
    return Tokens(manifest, load("train.bin", dtype), load("valid.bin", dtype), docs, vocabulary)

# %% The order of the data: a rule instead of a shuffled list
# A pass over N sequences visits (a·i + b) mod N for i = 0, 1, ...: with a and N coprime each once, and neighbours in
# a batch are far apart in the files. a is near N/golden ratio, b and where the cuts fall change with the pass. So the
# n-th sequence of a run is a function of n: a step number is the data position, and any process can find its share.
def sequence_start(n, num_tokens, T, seed):
    """Where sequence n of the run begins. Raises Refusal if there are not even two sequences."""
    N = num_tokens // T - 1
    if N < 1:
        raise Refusal(f"{num_tokens:,} training tokens are too few for sequences of {T}; lower --seq-len")
    epoch, i = divmod(n, N)
    random = np.random.default_rng([seed, epoch])
    stride = max(1, int(N * (math.sqrt(5) - 1) / 2))
    while math.gcd(stride, N) > 1:
        stride += 1
    return (stride * i + int(random.integers(N))) % N * T + int(random.integers(T))


def training_batch(tokens, settings, step, rank=0, world=1):
    """The share of process `rank` in the batch of `step`: (sequences, T + 1) int64, inputs and their next tokens."""
    G, T = settings.batch_tokens // settings.seq_len, settings.seq_len
    starts = [sequence_start(step * G + i, len(tokens), T, settings.seed) for i in range(rank, G, world)]
    return torch.from_numpy(np.stack([tokens[start : start + T + 1] for start in starts]).astype(np.int64))

# %% One step
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
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), fused=device.type == "cuda")


def losses_of(model, tokens, device, reduction="none"):
    """−ln p of every next token: tokens (B, T + 1) -> (B, T). bf16 on a GPU, the loss itself in float32."""
    tokens = tokens.to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.float().transpose(1, 2), tokens[:, 1:], reduction=reduction)


def backward(model, batch, settings, place):
    """Gradients of the mean loss over the global batch, piece by piece; returns that loss.

    DistributedDataParallel averages over processes, once, in the last piece; every process has an equal share.
    """
    total, parts = torch.zeros((), device=place.device), batch.split(settings.micro_batch)
    for i, part in enumerate(parts):
        alone = place.world == 1 or i + 1 == len(parts)
        with nullcontext() if alone else model.no_sync():
            loss = losses_of(model, part, place.device, "mean") * (len(part) / len(batch))
            loss.backward()
        total += loss.detach()
    if place.world > 1:
        dist.all_reduce(total)
    return total.item() / place.world


def train_step(model, optimizer, batch, step, settings, place):
    """One update: returns the record of it."""
    start = time.perf_counter()
    lr = learning_rate(step, settings)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    loss = backward(model, batch, settings, place)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip).item()
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise Refusal(f"step {step}: loss {loss}, gradient {norm}; lower --lr (the last checkpoint is intact)")
    optimizer.step()
    rate = settings.batch_tokens / (time.perf_counter() - start)
    return {"step": step, "loss": loss, "lr": lr, "norm": norm, "tokens_per_s": rate}

# %% Checkpoints
# Weights, optimiser, the number of the next step (which is also the place in the data and in the learning-rate
# schedule), random states, settings. Tensors and plain types only: `weights_only=True` runs no code when it loads.
def save_checkpoint(path, model, optimizer, step, mixer, settings, data):
    """Serialise in memory, then write atomically: a kill at any moment leaves the old file or the new one."""
    content = {
        "format": 1, "model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "mixer": mixer,
        "config": asdict(model.config), "settings": asdict(settings), "tokenizer": identity(data.vocabulary),
        "data": [data.manifest["sources"], data.manifest["sizes"]], "random": torch.get_rng_state(),
        "cuda_random": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getbuffer())


def load_checkpoint(path):
    """The content of a checkpoint. Raises Refusal if it is not one."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["format"] == 1:
            return content
    except FileNotFoundError:
        raise Refusal(f"{path}: no such checkpoint") from None
    except Exception:  # a zip error, a pickle that wants to run code, a missing key: it is not ours
        pass
    raise Refusal(f"{path}: not a checkpoint of this program, or damaged")


def restore(path, model, optimizer, mixer, settings, data):
    """Put a checkpoint back; returns the next step. Raises Refusal if it belongs to another run."""
    found = load_checkpoint(path)
    old, new = found["settings"] | {"mixer": found["mixer"]}, asdict(settings) | {"mixer": mixer}
    for name in new.keys() - FREE:
        if old.get(name) != new[name]:
            raise Refusal(f"{path} was made with {name} = {old.get(name)}, not {new[name]}; --resume changes nothing")
    if found["data"] != [data.manifest["sources"], data.manifest["sizes"]]:
        raise Refusal(f"{path} was trained on other data; give the same --data, or another --out")
    model.load_state_dict(found["model"])
    optimizer.load_state_dict(found["optimizer"])
    torch.set_rng_state(found["random"])
    if found["cuda_random"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(found["cuda_random"][: torch.cuda.device_count()])
    return found["step"]

# %% Training
def make_model(mixer, settings, data, place):
    """A model from the seed. Same weights in every process."""
    torch.manual_seed(settings.seed)
    return models.LanguageModel(model_config(mixer, settings, data.vocabulary.size)).to(place.device)


def make_ready(model, place, options):
    """What wraps a model for training: recomputed blocks for long sequences, DDP, torch.compile."""
    if options.recompute:
        for block in model.blocks:
            block.forward = partial(recompute, block.forward, use_reentrant=False)
    if place.world > 1:
        model = DistributedDataParallel(model, device_ids=[place.device.index] if place.device.type == "cuda" else None)
    return torch.compile(model) if options.compile else model


def read_log(path, steps):
    """The records of the first `steps` steps; a line that was being written when a run was killed is not one."""
    records = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            break
        if record["step"] != len(records) or len(records) == steps:
            break
        records.append(record)
    return records


def train(mixer, settings, data, folder, place, options):
    """Train one model, or what is left of it with --resume. Returns the model and a record for each step."""
    model = make_model(mixer, settings, data, place)
    optimizer, path, done = make_optimizer(model, settings, place.device), folder / "checkpoint.pt", 0
    if options.resume and path.exists():
        done = restore(path, model, optimizer, mixer, settings, data)
    elif place.rank == 0:
        path.unlink(missing_ok=True)  # of an earlier run
    log, ready = read_log(folder / "log.jsonl", done), make_ready(model, place, options)
    if place.rank == 0:
        write_atomically(folder / "log.jsonl", b"".join(json.dumps(record).encode() + b"\n" for record in log))
    bar = tqdm(range(done, settings.steps), mixer, initial=done, total=settings.steps, disable=place.rank > 0)
    with open(folder / "log.jsonl" if place.rank == 0 else os.devnull, "a") as file:
        for step in bar:
            batch = training_batch(data.train, settings, step, place.rank, place.world)
            log.append(train_step(ready, optimizer, batch, step, settings, place))
            print(json.dumps(log[-1]), file=file, flush=True)
            line = "loss {loss:.3f}, lr {lr:.1e}, norm {norm:.2f}, {tokens_per_s:,.0f} tokens/s"
            bar.set_postfix_str(line.format(**log[-1]))
            due = (step + 1) % settings.save_every == 0 or step + 1 == settings.steps
            if due and place.rank == 0:
                save_checkpoint(path, model, optimizer, step + 1, mixer, settings, data)
    return model, log

# %% Which tokens could be recalled
# Perplexity over all tokens mixes two abilities: knowing the language, and looking up what the context has said. The
# second is what linear attention is short of. The paper reports both, but its code for the slices is unpublished [P
# Table 2], so here are three definitions, and the share of tokens is always printed beside the number:
#   token    x_t occurred earlier in the context                    (nearly every byte has: this is made for words)
#   bigram   (x_{t-1}, x_t) did, so a copy head could know x_t      [Z]
#   rare     and that bigram is rare in training, so knowing the language does not help     [Z: at most 1,250 times]
DEFINITIONS = ("token", "bigram", "rare")
RARE, COUNTED = 1250, 50_000_000  # the cap; how many training tokens are counted, from the beginning


def seen_before(keys):
    """keys (n,) -> bool (n,): has this value occurred earlier?"""
    seen = np.ones(len(keys), dtype=bool)
    seen[np.unique(keys, return_index=True)[1]] = False
    return seen


def bigram_keys(tokens):
    """tokens (..., n) -> (..., n − 1), one number for each pair of neighbours."""
    tokens = tokens.astype(np.int64)
    return tokens[..., :-1] * 2**32 + tokens[..., 1:]


def count_bigrams(tokens):
    """(keys in rising order, how often each occurs) in the first COUNTED tokens."""
    return np.unique(bigram_keys(tokens[:COUNTED]), return_counts=True)


def recall_mask(tokens, definition="bigram", counts=None):
    """tokens (B, n), each row a context -> bool (B, n): which are AR tokens. counts: of `count_bigrams`, for "rare"."""
    mask = np.zeros(tokens.shape, dtype=bool)
    for row, context in zip(mask, tokens, strict=True):
        if definition == "token":
            row[:] = seen_before(context)
            continue
        keys = bigram_keys(context)
        row[1:] = seen_before(keys)
        if definition == "rare":
            known, numbers = counts
            place = np.searchsorted(known, keys).clip(max=max(0, len(known) - 1))
            row[1:] &= ~((known[place] == keys) & (numbers[place] > RARE)) if len(known) else True
    return mask

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
def score(model, stream, T, device, counts, per_pass=4096):
    """Losses (n,) of the tokens in stream (n,), its first entry (a separator) not counted, and their AR masks."""
    total, T = len(stream) - 1, min(T, len(stream) - 1)
    losses, masks = np.zeros(total), {name: np.zeros(total, dtype=bool) for name in DEFINITIONS}
    windows, size = list(scored_windows(total, T, max(1, T // 2))), max(1, per_pass // T)
    for i in tqdm(range(0, len(windows), size), desc="evaluate", leave=False):
        part = windows[i : i + size]
        tokens = np.stack([stream[start : start + T + 1] for start, _ in part]).astype(np.int64)
        found = losses_of(model, torch.from_numpy(tokens), device).cpu().numpy()
        marked = {name: recall_mask(tokens, name, counts)[:, 1:] for name in DEFINITIONS}
        for row, (start, begin) in enumerate(part):
            losses[begin : start + T] = found[row, begin - start :]
            for name in DEFINITIONS:
                masks[name][begin : start + T] = marked[name][row, begin - start :]
    return losses, masks


def bits_per_byte(loss, tokens, num_bytes):
    """(tokens / bytes) · loss / ln 2 for a mean loss in nats over so many tokens. [G 3.1]"""
    return tokens / num_bytes * loss / math.log(2)


def validation_stream(data, limit):
    """Whole validation documents of about `limit` tokens: (stream with a separator first, their rows)."""
    docs = data.valid_docs
    if not len(docs):
        raise Refusal("no document fell into the validation part; give more documents or a larger --valid-share")
    docs = docs[: max(1, np.searchsorted(docs[:, 0], limit))]
    end = docs[-1, 0] + docs[-1, 1] + 1
    return np.append([data.vocabulary.separator], data.valid[:end]), docs


def perplexity(losses):
    return math.exp(min(700.0, losses.mean())) if len(losses) else math.nan


def evaluate(model, data, settings, device, counts):
    """All numbers of one model, plain types only."""
    model.eval()
    stream, docs = validation_stream(data, settings.eval_tokens)
    losses, masks = score(model, stream, settings.seq_len, device, counts)
    subset = np.repeat(docs[:, 3], docs[:, 1] + 1)  # of every token; a separator belongs to the document it ends
    text = np.ones(len(losses), dtype=bool)
    text[docs[:, 0] + docs[:, 1]] = False  # False at separators
    subsets = {}
    for i in np.unique(subset).tolist():
        chosen, num_bytes = losses[text & (subset == i)], docs[docs[:, 3] == i, 2].sum()
        subsets[data.manifest["names"][i]] = {
            "bytes": int(num_bytes), "perplexity": perplexity(losses[subset == i]),
            "bits_per_byte": chosen.sum() / math.log(2) / max(1, num_bytes)}
    slices = {name: {"share": mask.mean(), "recall": perplexity(losses[mask]), "other": perplexity(losses[~mask])}
              for name, mask in masks.items()}
    bits = bits_per_byte(losses[text].mean(), text.sum(), max(1, docs[:, 2].sum()))
    return {"loss": losses.mean(), "perplexity": perplexity(losses), "tokens": len(losses), "bits_per_byte": bits,
            "slices": slices, "subsets": subsets,
            "by_position": loss_by_position(model, stream, settings.eval_length, device)}


@torch.no_grad()
def loss_by_position(model, stream, length, device):
    """[(last position, mean loss)] of positions 1-16, 17-32, 33-64, ... in contexts of `length`, also unseen ones."""
    length = min(length, len(stream) - 1)
    starts = range(0, len(stream) - length, length)
    contexts = (torch.from_numpy(stream[start : start + length + 1].astype(np.int64)) for start in starts)
    total = sum(losses_of(model, context.unsqueeze(0), device)[0].double() for context in contexts).cpu().numpy()
    edges = [0, *[2**n for n in range(4, 40) if 2**n < length], length]
    return [(b, (total[a:b] / len(starts)).mean()) for a, b in zip(edges, edges[1:], strict=False)]

# %% Generation
# A prompt is read by the chunked form, then every token costs one step. The state of a kernel model is a value of
# constant size: save it after a long document and continue that document many times without reading it again.
@torch.no_grad()
def read_context(model, ids, states=None, piece=8192):
    """Take ids (1, n) into the states, some thousand tokens at a time."""
    for part in ids.split(piece, dim=1):
        _, states = model.prefill(part, states)
    return states


def stream_text(model, vocabulary, ids, length, temperature, top_k, states=None):
    """Continue ids (a list, at least one): yields pieces of text until a separator is chosen or `length` tokens are."""
    device, held = model.embedding.weight.device, []
    states = read_context(model, torch.tensor([ids[:-1]], device=device), states) if ids[:-1] else states
    for token in models.generate(model, torch.tensor([ids[-1:]], device=device), length, temperature, top_k, states):
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
    """A state and the tokens not yet taken into it, as tensors and plain types."""
    layers = [state if isinstance(state, torch.Tensor) else list(state) for state in states]  # no class of ours
    buffer = io.BytesIO()
    torch.save({"state_of": model_digest(model), "length": states.length, "layers": layers, "ids": ids}, buffer)
    write_atomically(path, buffer.getbuffer())


def load_state(path, model):
    """-> (states, ids) of `save_state`. Raises Refusal for another model's."""
    device = model.embedding.weight.device
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        owner, layers, ids = content["state_of"], content["layers"], content["ids"]
    except Exception:
        raise Refusal(f"{path}: cannot be read as a saved state") from None
    if owner != model_digest(model):
        raise Refusal(f"{path} is the state of another model; read the document again with this one")
    kinds = [linear_attention.State._make if name in models.KERNEL_NAMES else tuple for name in model.config.mixers]
    states = models.States(x if isinstance(x, torch.Tensor) else kind(x) for kind, x in zip(kinds, layers, strict=True))
    states.length = content["length"]
    return states, ids


def load_model(path, device, tokenizer_file=None):
    """A checkpoint's model and vocabulary. Raises Refusal."""
    content = load_checkpoint(path)
    vocabulary = make_vocabulary(content["tokenizer"]["name"], tokenizer_file)
    if identity(vocabulary) != content["tokenizer"]:
        raise Refusal(f"{path} was trained with another {vocabulary.name} tokenizer; give its --tokenizer-file")
    model = models.LanguageModel(models.ModelConfig(**content["config"]))
    model.load_state_dict(content["model"])
    return model.to(device).eval(), vocabulary


def sample_command(options, device):
    """--sample, --document, --save-state, --load-state."""
    if options.length < 1 or options.temperature < 0 or (options.top_k or 1) < 1:
        raise Refusal("--length and --top-k must be at least 1, --temperature must not be negative")
    model, vocabulary = load_model(options.checkpoint, device, options.tokenizer_file)
    torch.manual_seed(options.seed if options.seed is not None else 0)
    states, ids = load_state(options.load_state, model) if options.load_state else (None, [vocabulary.separator])
    if options.document:
        ids = ids + vocabulary.encode(options.document.read_text("utf-8", "replace"))[0].tolist()
    if options.save_state:  # all but the last token: that one predicts what follows
        if ids[:-1]:
            states = read_context(model, torch.tensor([ids[:-1]], device=device), states)
        if states is None:
            raise Refusal("--save-state needs a --document to read")
        ids = ids[-1:]
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


def states_after(model, context):
    """States after `context` random tokens; a softmax cache is filled with noise, its cost is the same."""
    tokens = torch.randint(256, (1, context), generator=torch.Generator().manual_seed(0))
    if "attention" not in model.config.mixers:
        return read_context(model, tokens)
    _, states = model.prefill(tokens[:, :2])
    grown = models.States(tuple(torch.randn(1, x.shape[1], context, x.shape[3]) for x in state)
                          if isinstance(state, tuple) else state for state in states)
    grown.length = context
    return grown


@torch.no_grad()
def decoding_costs(mixer, contexts=CONTEXTS, repeats=100):
    """[(bytes of state, median seconds of a step)]: the contexts take turns, so that noise meets all of them alike."""
    torch.manual_seed(0)
    model = models.LanguageModel(laptop_config(mixer, 256)).eval()
    states, times = [states_after(model, context) for context in contexts], [[] for _ in contexts]
    for _ in range(repeats):
        for state, taken in zip(states, times, strict=True):
            start = time.perf_counter()
            model.step(torch.tensor([65]), state)
            taken.append(time.perf_counter() - start)
    return [(models.state_bytes(x), sorted(taken)[repeats // 2]) for x, taken in zip(states, times, strict=True)]


def print_decoding(mixers):
    print("One more token after a context of so many: kilobytes of state, milliseconds (median of 100, taking turns)\n")
    print(f"{'':10}" + "".join(f"{context:>22,}" for context in CONTEXTS))
    for mixer in mixers:
        cells = "".join(f"{size / 1024:10,.0f} KB {taken * 1e3:5.2f} ms" for size, taken in decoding_costs(mixer))
        print(f"{mixer:10}{cells}")
    print()

# %% FLOPs, for the utilisation of a GPU
def flops_per_token(config, T):
    """Multiplications and additions of a training step per token: 6 a weight, and 3 times the mixers' forward."""
    weights = models.count_parameters(config) - config.positions * config.d_model
    mixing, P, width = 0, config.feature_dim * (config.feature_dim + 1) // 2, config.d_model
    for name in config.mixers:
        mixing += 2 * T * width if name == "attention" else 4 * P * width if name in models.KERNEL_NAMES else 0
    return 6 * weights + 3 * mixing

# %% Claims
def check_masks_equal_a_slow_count():
    """The three masks against the definition, token by token."""
    tokens = np.random.default_rng(0).integers(0, 5, (3, 40))
    counts = (np.unique(bigram_keys(np.array([1, 2, 3]))), np.array([RARE, RARE + 1]))  # (1, 2) is rare, (2, 3) is not
    for row in range(3):
        x = tokens[row].tolist()
        pairs = list(zip(x, x[1:], strict=False))
        slow = {"token": [x[t] in x[:t] for t in range(40)],
                "bigram": [t > 0 and pairs[t - 1] in pairs[: t - 1] for t in range(40)]}
        slow["rare"] = [is_ar and pairs[t - 1] != (2, 3) for t, is_ar in enumerate(slow["bigram"])]
        for name in DEFINITIONS:
            assert recall_mask(tokens, name, counts)[row].tolist() == slow[name], name


def check_every_token_is_scored_once():
    """Windows of any size cover the tokens without overlap of what is scored, with T/2 of context or more."""
    for total in (1, 7, 8, 9, 31, 100):
        for T in (1, 2, 8, 16):
            T, covered = min(T, total), []
            for start, begin in scored_windows(total, T, max(1, T // 2)):
                assert start == 0 or begin - start >= T // 2
                covered += range(begin, start + T)
            assert covered == list(range(total)), (total, T)


def check_a_pass_visits_every_sequence_once():
    """Sequences of one pass do not overlap, and two processes together have the batch of one."""
    tokens, T = np.arange(10_000) % 251, 64
    N = len(tokens) // T - 1
    for epoch in range(3):
        starts = sorted(sequence_start(n, len(tokens), T, seed=3) for n in range(epoch * N, (epoch + 1) * N))
        assert starts == [starts[0] + T * i for i in range(N)] and starts[-1] + T < len(tokens)
    settings = Settings(seq_len=T, batch_tokens=8 * T)
    whole = training_batch(tokens, settings, 5)
    for rank in range(2):
        assert torch.equal(training_batch(tokens, settings, 5, rank, 2), whole[rank::2])


def check_uniform_is_eight_bits():
    """A model without an opinion needs 8 bits per byte."""
    model = models.LanguageModel(laptop_config("rebased", 256))
    torch.nn.init.zeros_(model.embedding.weight)
    losses, _ = score(model, np.arange(300) % 256, 64, torch.device("cpu"), (np.zeros(0, int), np.zeros(0, int)))
    assert abs(bits_per_byte(losses.mean(), 299, 299) - 8) < 1e-6


def check_sizes():
    """The laptop models are equal in size within 0.2 %, the paper's exact."""
    sizes = [models.count_parameters(laptop_config(mixer, 256)) for mixer in ("rebased", "based", "attention")]
    assert max(sizes) < 1.002 * min(sizes), sizes
    paper = Settings(**PRESETS["paper"])
    counts = [models.count_parameters(model_config(m, paper, 50280)) for m in ("attention", "based", "rebased")]
    assert counts == [151_880_448, 147_542_016, 147_548_928], counts


CHECKS = [check_masks_equal_a_slow_count, check_every_token_is_scored_once, check_a_pass_visits_every_sequence_once,
          check_uniform_is_eight_bits, check_sizes]

# %% Tables and the figure
def print_tables(rows, settings):
    """The models; the slices under three definitions; the subsets."""
    print(f"\n{settings.steps} steps of {settings.batch_tokens:,} tokens, T = {settings.seq_len}; validation: "
          f"{rows[0]['tokens']:,} tokens. AR: the bigram occurred earlier in the context.\n")
    print(f"{'model':10}{'parameters':>12}{'loss':>8}{'bits/byte':>11}{'perplexity':>12}"
          f"{'AR':>8}{'other':>9}{'tokens/s':>10}")
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
        losses, width = np.array([record["loss"] for record in log]), max(1, len(log) // 40)
        smooth = np.convolve(losses, np.ones(width) / width, "valid") if len(log) else losses
        left.plot((np.arange(len(smooth)) + width) * settings.batch_tokens, smooth, label=row["mixer"])
        right.plot(*zip(*row["by_position"], strict=True), "o-", label=row["mixer"])
    right.axvline(settings.seq_len, color="gray", linestyle=":", linewidth=1)
    left.set(title="training", xlabel="tokens", ylabel="loss, nats a token")
    right.set(title="validation, by position (dotted: trained length)", xlabel="position in the context", xscale="log")
    left.legend(frameon=False)
    figure.savefig(path, dpi=120)
    print(f"figure: {path}")


def provenance(seed, minutes):
    """What a row of results needs beside its numbers."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git here
        commit = ""
    cpu = Path("/proc/cpuinfo")
    chip = re.search(r"model name\s*: (.*)|$", cpu.read_text() if cpu.exists() else "").group(1) or platform.machine()
    chip = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{chip}, {torch.get_num_threads()} threads"
    return {"command": " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]), "seed": seed, "hardware": chip,
            "python": platform.python_version(), "torch": torch.__version__, "commit": commit,
            "date": time.strftime("%Y-%m-%d"), "minutes": minutes}


def print_reading(rows, settings):
    """What the table says."""
    ordered = sorted(rows, key=lambda row: row["bits_per_byte"])
    ranking = ", ".join(f"{row['mixer']} {row['bits_per_byte']:.3f}" for row in ordered)
    best = ordered[0]["slices"]["bigram"]
    print(f"Bits per byte after {settings.steps * settings.batch_tokens:,} tokens, one seed: {ranking}.")
    print(f"{best['share']:.0%} of the tokens end a bigram that the context has had: perplexity {best['recall']:.2f} "
          f"for {ordered[0]['mixer']}, {best['other']:.2f} for the others.")
    print("So short a run shows how to measure, not which model is best.\n")

# %% The command line
def make_parser():
    parser = argparse.ArgumentParser(description="05: train, evaluate and sample language models (4 minutes)")
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
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    local = int(os.environ.get("LOCAL_RANK", 0))
    try:
        device = torch.device(device or (f"cuda:{local}" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise Refusal(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return Place(device, rank, world)


def load_data(options, settings, place):
    """The Tokens that the options ask for."""
    vocabulary = make_vocabulary(settings.tokenizer, options.tokenizer_file)
    if options.data:
        files = find_files(options.data)
    else:
        files = [Path("runs") / f"python-{platform.python_version()}.jsonl"]
        if place.rank == 0 and not files[0].exists():
            write_library(files[0])
        while not files[0].exists():
            time.sleep(0.5)
    key = json.dumps([[[str(f), f.stat().st_size] for f in files], identity(vocabulary), settings.valid_share])
    folder = options.tokens or Path("runs") / f"tokens-{vocabulary.name}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    return prepare_tokens(folder, files, settings, vocabulary, place.rank == 0)


def print_data(manifest):
    """What was read, by subset, and what could not be."""
    for split, rows in manifest["subsets"].items():
        documents, num_bytes = (sum(row[x] for row in rows.values()) for x in ("documents", "bytes"))
        shares = ", ".join(f"{name} {row['bytes'] / max(1, num_bytes):.1%}" for name, row in rows.items())
        print(f"{split}: {documents:,} documents, {num_bytes:,} bytes ({shares})")
    lost = [f"{count:,} × {reason}" for reason, count in manifest["problems"].items()]
    if lost or manifest["zero_bytes"]:
        print(f"not used: {', '.join([*lost, str(manifest['zero_bytes']) + ' zero bytes'])}")


def train_and_compare(options, settings, place):
    """Train each mixer, evaluate it, show the table; returns how many checks failed."""
    started, data, out = time.time(), load_data(options, settings, place), options.out or Path("runs/pile")
    sequences = settings.batch_tokens // settings.seq_len
    if sequences % place.world:
        raise Refusal(f"{place.world} processes cannot share a batch of {sequences} sequences evenly")
    for mixer in options.mixers:
        if options.out and not options.resume and (out / mixer / "checkpoint.pt").exists():
            raise Refusal(f"{out / mixer} holds a checkpoint: continue it with --resume, or choose another --out")
    main, rows, logs = place.rank == 0, [], []
    if main:
        print_data(data.manifest)
        counts = count_bigrams(data.train)
    for mixer in options.mixers:
        model, log = train(mixer, settings, data, out / mixer, place, options)
        if main:
            rates = sorted(record["tokens_per_s"] for record in log) or [math.nan]
            row = {"mixer": mixer, "parameters": sum(p.numel() for p in model.parameters()),
                   "tokens_per_s": rates[len(rates) // 2], "settings": asdict(settings)}
            rows.append(row | evaluate(model, data, settings, place.device, counts))
            logs.append(log)
            print_sample(model, data.vocabulary, mixer)
            print_utilisation(model.config, settings, row["tokens_per_s"], options.peak_tflops, place)
        if place.world > 1:
            dist.barrier()
    return report(rows, logs, settings, out, options, started) if main else 0


def print_sample(model, vocabulary, mixer, prompt="def "):
    """Some lines in the model's own words."""
    torch.manual_seed(0)
    ids = [vocabulary.separator, *vocabulary.encode(prompt)[0].tolist()]
    text = "".join(stream_text(model, vocabulary, ids, 160, 0.7, None))
    print(f"\n{mixer}, continuing {prompt!r}:\n" + "\n".join(f"  | {line}" for line in (prompt + text).splitlines()))


def print_utilisation(config, settings, rate, peak, place):
    """Model FLOPs per second, and their share of what the hardware could do."""
    rate *= flops_per_token(config, settings.seq_len)
    share = f", {rate / place.world / peak / 1e12:.1%} of the peak" if peak else ""
    print(f"  {rate / 1e12:.3f} TFLOP/s by the model's own count{share}")


def report(rows, logs, settings, out, options, started):
    """Tables, reading, figure, the rows as JSON lines, the checks."""
    print_tables(rows, settings)
    print_reading(rows, settings)
    source = provenance(settings.seed, round((time.time() - started) / 60, 1))
    write_atomically(out / "results.jsonl", "".join(json.dumps(source | row) + "\n" for row in rows).encode())
    draw(rows, logs, settings, options.figure)
    print(f"rows: {out / 'results.jsonl'}\n")
    return kernels.run_checks(CHECKS)


def run(options):
    """What the options ask for; returns how many checks failed."""
    if options.decode_cost:
        print_decoding(options.mixers)
        return 0
    place = find_place(options.device)
    if options.sample is not None or options.document or options.save_state:
        return sample_command(options, place.device)
    given = {item.name: getattr(options, item.name) for item in fields(Settings)}
    settings = Settings(**PRESETS[options.preset] | {name: value for name, value in given.items() if value is not None})
    if place.world == 1:
        return train_and_compare(options, settings, place)
    dist.init_process_group("nccl" if place.device.type == "cuda" else "gloo", timeout=timedelta(hours=12))
    try:
        return train_and_compare(options, settings, place)
    finally:
        dist.destroy_process_group()


def main(argv=None):
    """The command; returns how many checks failed, exits with status 2 and one line for what cannot be done."""
    parser = make_parser()
    options = kernels.parse_arguments(parser, argv)
    try:
        return run(options)
    except (Refusal, OSError, UnicodeError) as error:
        parser.exit(2, f"error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\nstopped; the same command with --resume goes on from the last checkpoint\n")


if __name__ == "__main__":
    if main():
        sys.exit(1)
