"""05 · The Pile's data: from files that may be broken to batches in an order that can be computed

Aim: turn text files of any size into tokens on the disk, once, and number the sequences that are cut from them.

You will learn
  1. what lies between a file and its texts: layouts that differ, broken lines, files that end too early;
  2. a split that stays where it is: a hash of the document itself decides;
  3. how to write so that a kill at any moment leaves the old file or the new one;
  4. a shuffle without a list: the n-th sequence of a run is a function of n;
  5. which tokens a model could copy from the context: what perplexity over all tokens hides.

Equations
  validation       a document is in it if sha256(document) / 2^256 < share
  order            of N sequences the i-th visited is (a·i + b) mod N, a and N coprime
  AR tokens        those that recall could predict: x_t, or (x_{t−1}, x_t), occurred earlier in the context  [P, Z]
  bits per byte    8 · len(zlib(text)) / len(text): what looking up repetitions achieves, the mark for a model

Letters: T the length of a training sequence, N the sequences of one pass, V the size of the vocabulary.

References: [P] as in 01, Table 2; [Z] Arora et al., Zoology, arXiv 2312.04927; [G] Gao et al., The Pile, arXiv 2101.00027.

Run: python 05_pile_data.py                    (5 seconds, nothing to download)
     python 05_pile_data.py --data FOLDER      (.jsonl, .jsonl.zst, .jsonl.gz; 05_train_pile.py finds the tokens)
"""
# %%
import argparse
import gzip
import hashlib
import json
import math
import os
import platform
import sys
import sysconfig
import time
import zlib
from collections import Counter
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

kernels = import_module("01_kernels")


class Refusal(Exception):
    """What the user can mend, told in one line by `obey`."""


def obey(parser, command, after_a_stop):
    """command(), with one line and status 2 instead of a stack trace for what the user can mend."""
    try:
        return command()
    except (Refusal, OSError, UnicodeError) as error:
        named = f"cannot use {error.filename}: {error.strerror}" if getattr(error, "filename", None) else error
        parser.exit(2, f"error: {named}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"\nstopped; {after_a_stop}\n")


def optional(name, purpose):
    """Import a library that only some commands need."""
    try:
        return import_module(name)
    except ImportError:
        raise Refusal(f"{purpose} needs {name}: pip install {name}") from None

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

# %% Files that are whole or not there
def claim(folder):
    """A lock on a folder, made if missing, until the file returned is closed or the process dies. Raises Refusal."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / "lock", "w")
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows has no such lock and goes without
        pass
    except BlockingIOError:
        file.close()
        raise Refusal(f"another run is writing to {folder}; wait for it or choose another folder") from None
    return file


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

# %% Text that comes with every Python
# Without --data: the standard library's sources and the texts of its help(), written down once in the Pile's format,
# with subsets. Files of more than 16 KB stay out, so that a short validation has many documents. Another version of
# Python has other text: compare numbers within one version.
def library_documents():
    """Yields (text, subset): Library and Tests from source files, Help from what help("if") and the like show."""
    from pydoc_data.topics import topics

    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts  # pydoc_data holds the help texts below, encodings tables of numbers
        if "site-packages" in parts or parts[0] in ("pydoc_data", "encodings") or path.stat().st_size > 2**14:
            continue
        try:
            yield path.read_bytes().decode(), "Tests" if {"test", "tests", "idle_test"} & set(parts) else "Library"
        except UnicodeDecodeError:  # the tests hold files that are wrong on purpose
            continue
    for text in topics.values():
        yield text, "Help"


def write_library(path):
    """Write those documents to a .jsonl file, in an order that only their content decides."""
    found = {hashlib.sha256(text.encode()).digest(): (text, name) for text, name in library_documents() if text}
    rows = (json.dumps({"text": text, "meta": {"pile_set_name": name}}) for _, (text, name) in sorted(found.items()))
    write_atomically(path, "\n".join([*rows, ""]).encode())

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
        self.name, local = name, file or name == "gpt-neox"
        library = optional("tokenizers" if local else "tiktoken", f"tokenizer {name}")
        try:
            size = self.use_tokenizers(library, file) if local else self.use_tiktoken(library)
        except Exception as error:  # these libraries raise whatever their network layer or parser raises
            how = "is no tokenizer.json" if file else "without network: give --tokenizer-file tokenizer.json"
            raise Refusal(f"cannot load tokenizer {name}, {file or ''} {how} ({type(error).__name__})") from None
        if self.separator is None:
            raise Refusal(f"{file}: this tokenizer has no <|endoftext|>")
        self.size = -(-size // 8) * 8

    def use_tokenizers(self, library, file):
        load = library.Tokenizer
        codec = load.from_file(str(file)) if file else load.from_pretrained("EleutherAI/gpt-neox-20b")
        codec.encode_special_tokens = True  # "<|endoftext|>" inside a text is text
        self.to_ids = lambda text: codec.encode(text, add_special_tokens=False).ids
        self.decode = lambda ids: codec.decode(list(ids), skip_special_tokens=False)
        self.separator = codec.token_to_id("<|endoftext|>")
        return codec.get_vocab_size()

    def use_tiktoken(self, library):
        codec = library.get_encoding("gpt2")
        self.to_ids, self.decode, self.separator = codec.encode_ordinary, codec.decode, codec.eot_token
        return codec.n_vocab

    def encode(self, text):
        return np.array(self.to_ids(text), dtype=np.int64), len(text.encode()), 0


TOKENIZERS = ("bytes", "gpt2", "gpt-neox")


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
    """Tokenised data: memory maps of tokens and the rows of the validation documents."""

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


def load_data(paths, vocabulary, valid_share, folder=None, main=True):
    """The Tokens of these files and folders, of Python's own text if there are none: made, completed or reused.

    Under torchrun only the main process writes; the others wait for it. Raises Refusal.
    """
    if not 0 < valid_share < 1:
        raise Refusal(f"--valid-share must lie between 0 and 1, got {valid_share}")
    library = Path("runs") / f"python-{platform.python_version()}.jsonl"
    while not paths and not library.exists():
        write_library(library) if main else time.sleep(0.5)
    files = find_files(paths or [library])
    wanted = {"format": 1, "tokenizer": identity(vocabulary), "valid share": valid_share,
              "sources": [[str(path), path.stat().st_size] for path in files]}
    key = hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:8]
    folder = folder or Path("runs") / f"tokens-{vocabulary.name}-{key}"
    while not (manifest := read_manifest(folder, wanted))["complete"]:
        if main:
            with claim(folder):  # and look again: whoever held it may have done the work
                write_tokens(folder, read_manifest(folder, wanted), files, vocabulary)
        else:
            time.sleep(0.5)
    return open_tokens(folder, manifest, vocabulary)


def read_manifest(folder, wanted):
    """The manifest of a folder, a fresh one if there is none; Refusal if it was made from or with something else."""
    path = folder / "manifest.json"
    if not path.exists():
        return wanted | {"complete": False, "at": [0, 0], "sizes": dict.fromkeys(PARTS, 0), "names": [],
                         "subsets": {"train": {}, "valid": {}}, "zero_bytes": 0, "problems": {}}
    try:
        manifest = json.loads(path.read_bytes())
        differs = [name for name in wanted if manifest[name] != wanted[name]]
    except (ValueError, KeyError, TypeError):
        raise Refusal(f"{path}: not a manifest of this program; choose another --tokens folder") from None
    if differs:
        raise Refusal(f"{folder} was made with other {differs[0]}; choose another --tokens folder or delete it")
    return manifest


def write_tokens(folder, manifest, files, vocabulary):
    """Tokenise what the manifest does not have yet."""
    sizes = [size for _, size in manifest["sources"]]
    with ExitStack() as stack, tqdm(total=sum(sizes), unit="B", unit_scale=True, desc="tokenise") as bar:
        parts = {name: stack.enter_context(open(folder / name, "ab")) for name in PARTS}
        for name, file in parts.items():
            file.truncate(manifest["sizes"][name])
            file.seek(0, os.SEEK_END)
        problems, since = Problems(manifest["problems"], parts["problems.txt"]), 0
        bar.update(sum(sizes[: manifest["at"][0]]))
        for place, text, subset in documents(files, problems, manifest["at"], bar.update):
            since += add_document(manifest, parts, text, subset, vocabulary)
            if since > COMMIT:
                commit(folder, manifest | {"at": place, "problems": problems.counts}, parts)
                since = 0
        if not sum(row["documents"] for split in manifest["subsets"].values() for row in split.values()):
            raise Refusal(f"not one document in {', '.join(map(str, files[:3]))}{' ...' if files[3:] else ''}")
        commit(folder, manifest | {"complete": True, "at": [len(files), 0], "problems": problems.counts}, parts)


def add_document(manifest, parts, text, subset, vocabulary):
    """Append one document, its separator, its row and its counts; returns its bytes."""
    split = "valid" if is_validation(text, manifest["valid share"]) else "train"
    (ids, num_bytes, zeros), dtype = vocabulary.encode(text), token_type(vocabulary.size)
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
    """The micro-batches of process `rank` in the batch of `step`: tensors (micro_batch, T + 1) int64, the last may be short.

    The batch is cut before it is shared: a micro-batch is the same whatever `world`, which must divide their number.
    """
    G, T, size = settings.batch_tokens // settings.seq_len, settings.seq_len, settings.micro_batch
    share = math.ceil(G / size) // world * size
    mine = range(step * G + rank * share, step * G + min(G, (rank + 1) * share))
    starts = [sequence_start(n, len(tokens), T, settings.seed) for n in mine]
    return torch.from_numpy(np.stack([tokens[start : start + T + 1] for start in starts]).astype(np.int64)).split(size)

# %% Which tokens could be recalled
# Perplexity over all tokens mixes two abilities: knowing the language, and looking up what the context has said. The
# second is what linear attention is short of. The paper reports both, but its code for the slices is unpublished [P
# Table 2], so here are three definitions, and the share of tokens is always printed beside the number:
#   token    x_t occurred earlier in the context                    (nearly every byte has: this is made for words)
#   bigram   (x_{t-1}, x_t) did, so a copy head could know x_t      [Z]
#   rare     and that bigram is rare in training, so knowing the language does not help     [Z: at most 1,250 times]
DEFINITIONS = ("token", "bigram", "rare")
RARE, COUNTED = 1250, 50_000_000  # the cap; how many training tokens are counted, from the beginning


def bigram_keys(tokens):
    """tokens (n,) -> (n − 1,), one number for each pair of neighbours."""
    tokens = tokens.astype(np.int64)
    return tokens[:-1] * 2**32 + tokens[1:]


def common_bigrams(tokens):
    """The keys of those that occur more than RARE times in the first COUNTED tokens."""
    keys, counts = np.unique(bigram_keys(tokens[:COUNTED]), return_counts=True)
    return keys[counts > RARE]


def recall_mask(tokens, definition="bigram", common=()):
    """tokens (B, n), each row a context -> bool (B, n): which are AR tokens. common: for "rare"."""
    mask = np.zeros(tokens.shape, dtype=bool)
    for row, context in zip(mask, tokens, strict=True):
        row, keys = (row, context) if definition == "token" else (row[1:], bigram_keys(context))
        row[:] = True
        row[np.unique(keys, return_index=True)[1]] = False  # where a value occurs for the first time
        if definition == "rare":
            row &= ~np.isin(keys, common)
    return mask

# %% What the files hold
def zlib_bits(data, subset):
    """Bits per byte that zlib needs for (the first thousand) validation documents of a subset, nan without one."""
    docs = data.valid_docs[data.valid_docs[:, 3] == subset][:1000].tolist()
    text = "\n".join(data.vocabulary.decode(data.valid[at : at + n].tolist()) for at, n, _, _ in docs).encode()
    return 8 * len(zlib.compress(text, 9)) / len(text) if text else math.nan


def print_table(data):
    """A row for each subset, then what could not be used; returns what zlib needs for each."""
    bits = [zlib_bits(data, i) for i in range(len(data.manifest["names"]))]
    print(f"{'':24}{'training':>22}{'validation':>24}{'bytes':>10}{'zlib, bits':>12}")
    print(f"{'subset':24}{'documents':>10}{'bytes':>14}{'documents':>12}{'bytes':>12}{'a token':>10}{'a byte':>12}")
    for i, name in enumerate(data.manifest["names"]):
        train, valid = (data.manifest["subsets"][split].get(name, Counter()) for split in ("train", "valid"))
        rate = (train["bytes"] + valid["bytes"]) / (train["tokens"] + valid["tokens"])
        print(f"{name[:23]:24}{train['documents']:10,}{train['bytes']:14,}{valid['documents']:12,}{valid['bytes']:12,}"
              f"{rate:10.2f}{bits[i]:12.3f}")
    zeros = {"zero bytes": data.manifest["zero_bytes"]} if data.manifest["zero_bytes"] else {}
    lost = [f"{count:,} × {reason}" for reason, count in (data.manifest["problems"] | zeros).items()]
    print(f"not used: {', '.join(lost) or 'nothing'}\n")
    return bits

# %% Claims
def check_a_pass_visits_every_sequence_once():
    """Sequences of one pass do not overlap."""
    for epoch in range(3):
        starts = sorted(sequence_start(n, 10_000, 64, seed=3) for n in range(epoch * 155, (epoch + 1) * 155))
        assert starts == [starts[0] + 64 * i for i in range(155)] and starts[-1] + 64 < 10_000


def check_masks_equal_a_slow_count():
    """The three masks against the definition, token by token."""
    tokens, common = np.random.default_rng(0).integers(0, 5, (3, 40)), [2 * 2**32 + 3]  # (2, 3) is not rare
    for i, x in enumerate(tokens.tolist()):
        pairs = list(zip(x, x[1:], strict=False))
        slow = {"token": [x[t] in x[:t] for t in range(40)],
                "bigram": [t > 0 and pairs[t - 1] in pairs[: t - 1] for t in range(40)]}
        slow["rare"] = [is_ar and pairs[t - 1] != (2, 3) for t, is_ar in enumerate(slow["bigram"])]
        for name in DEFINITIONS:
            assert recall_mask(tokens, name, common)[i].tolist() == slow[name], name


CHECKS = [check_a_pass_visits_every_sequence_once, check_masks_equal_a_slow_count]


def main(argv=None):
    """Tokenise, show what the files hold, run the checks; returns how many failed."""
    parser = argparse.ArgumentParser(description="05: read files in the Pile's format, tokenise them once (5 seconds)")
    parser.add_argument("--data", nargs="+", help="files or folders in the Pile's format (default: Python's own library)")
    parser.add_argument("--tokens", type=Path, help="folder for tokenised data (runs/tokens-...)")
    parser.add_argument("--tokenizer", choices=TOKENIZERS, default="bytes", help="(%(default)s)")
    parser.add_argument("--tokenizer-file", type=Path, help="a local tokenizer.json")
    parser.add_argument("--valid-share", type=float, default=0.05, help="share of the documents kept (%(default)s)")
    options = kernels.parse_arguments(parser, argv)
    return obey(parser, lambda: show(options), "the same command goes on from there")


def show(options):
    """The table and its reading."""
    vocabulary = make_vocabulary(options.tokenizer, options.tokenizer_file)
    data = load_data(options.data, vocabulary, options.valid_share, options.tokens)
    bits = [rate for rate in print_table(data) if rate == rate] or [math.nan]
    print(f"{len(data.valid_docs):,} documents are validation and stay so, whatever files come beside them. zlib, which knows\n"
          f"only repetitions in the last 32 KB, needs {min(bits):.2f} to {max(bits):.2f} bits a byte: the mark for a model.\n")
    return kernels.run_checks(CHECKS)


if __name__ == "__main__":
    if main():
        sys.exit(1)
