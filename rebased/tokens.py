"""Documents to tokens on the disk: vocabularies, and a folder of tokens that is made once and can be trusted.

    data = load_data(["FOLDER"], make_vocabulary("bytes"), valid_share=0.05)
    data.train        a memory map of all training tokens, documents one after the other, a separator behind each
    data.valid        those of the validation documents, and data.valid_docs, where each of them lies
    print_subsets(data)

A folder of tokens holds train.bin and valid.bin, which are nothing but tokens in the smallest integer type that fits;
train.docs and valid.docs with a row (start, tokens, bytes, subset) of int64 for each document; problems.txt with what
could not be used; and manifest.json, which says what went in and how far it is. The manifest is written after the files
are on the disk. So after a kill at any moment everything beyond it is cut off and made again.
"""

import hashlib
import json
import os
import platform
import time
import zlib
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from rebased.files import claim, write_atomically
from rebased.lesson import Refusal
from rebased.pile_data import Problems, documents, find_files, optional, shown, write_library

PARTS = ("train.bin", "valid.bin", "train.docs", "valid.docs", "problems.txt")
DEFAULT_FOLDER = Path("runs") / "tokens"
COMMIT = 32 * 2**20  # bytes of text between two states of the manifest
TOKENIZERS = ("bytes", "gpt2", "gpt-neox")


# Vocabularies
class Bytes:
    """256 tokens, nothing to load or train. Byte 0 ends a document; zero bytes of a text are dropped and counted."""

    name = "bytes"
    size = 256
    separator = 0

    def encode(self, text):
        """text -> (ids, bytes of text that the ids stand for, zero bytes dropped)."""
        ids = np.frombuffer(text.encode("utf-8"), dtype=np.uint8)
        kept = ids[ids != 0]
        return kept, len(kept), len(ids) - len(kept)

    def decode(self, ids):
        return bytes(i for i in ids if i != 0).decode("utf-8", "replace")


class BPE:
    """gpt2 through tiktoken or gpt-neox through tokenizers; either one from a local tokenizer.json.

    <|endoftext|> ends a document, and V is rounded up to a multiple of 8. Raises Refusal for what cannot be loaded.
    """

    def __init__(self, name, file=None):
        self.name = name
        local = file is not None or name == "gpt-neox"
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
        self.to_ids = codec.encode_ordinary
        self.decode = codec.decode
        self.separator = codec.eot_token
        return codec.n_vocab

    def encode(self, text):
        """text -> (ids, bytes of the text, 0)."""
        return np.array(self.to_ids(text), dtype=np.int64), len(text.encode("utf-8")), 0


def make_vocabulary(name, file=None):
    """The vocabulary of this name (see TOKENIZERS); file: a local tokenizer.json to make it from."""
    return Bytes() if name == "bytes" else BPE(name, file)


def identity(vocabulary):
    """What must agree before tokens of one run are used in another: the ids of a probe say which tokenizer it is."""
    probe = vocabulary.encode("The Pile:\n\n    naïve 1234 <|endoftext|> 東京\t\r\n")[0].tolist()
    digest = hashlib.sha256(json.dumps(probe).encode()).hexdigest()[:16]
    return {"name": vocabulary.name, "size": vocabulary.size, "separator": vocabulary.separator, "probe": digest}


# The folder of tokens
class Tokens(NamedTuple):
    """Tokenised data: memory maps of tokens, the rows of the validation documents, what was left out, in words."""

    manifest: dict
    train: np.ndarray
    valid: np.ndarray
    valid_docs: np.ndarray
    vocabulary: object
    notes: list


def token_type(vocab_size):
    if vocab_size <= 2**8:
        return np.dtype(np.uint8)
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def is_validation(text, share):
    """By a hash of the document itself: the same in any order, beside any other files, for every copy of it."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") < share * 2**64


def load_data(paths, vocabulary, valid_share, folder=None, main=True):
    """The Tokens of these files and folders, of Python's own text if there are none: made, completed or reused.

    folder: where they are kept (a folder in runs/tokens). Under torchrun only the main process writes; the others
    wait for it. Raises Refusal.
    """
    if not 0 < valid_share < 1:
        raise Refusal(f"valid_share must lie between 0 and 1, got {valid_share}")
    notes = []
    files = find_files(paths or [library_file(main)], notes)
    if folder is not None:
        refuse_foreign(folder)
    sources = fingerprints(files, (folder or DEFAULT_FOLDER) / "digests.json", main)
    wanted = {"format": 2, "tokenizer": identity(vocabulary), "valid share": valid_share, "sources": sources}
    key = hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:8]
    folder = folder or DEFAULT_FOLDER / f"{vocabulary.name}-{key}"
    while not read_manifest(folder, wanted)["complete"]:
        if not main:
            time.sleep(0.5)
            continue
        with claim(folder, wait=True):
            manifest = read_manifest(folder, wanted)  # again: whoever held the lock may have done the work
            if not manifest["complete"]:
                write_tokens(folder, manifest, files, vocabulary)
    return open_tokens(folder, read_manifest(folder, wanted), vocabulary, notes)


def library_file(main):
    """The path of the text that comes with Python, written if it is not there."""
    path = DEFAULT_FOLDER / f"python-{platform.python_version()}.jsonl"
    while not path.exists():
        if main:
            with claim(path.parent, wait=True):  # two runs may begin at once
                if not path.exists():
                    write_library(path)
        else:
            time.sleep(0.5)
    return path


def refuse_foreign(folder):
    """Raises Refusal if a folder holds files of these names that are not ours: ours never lack the manifest."""
    if folder.exists() and not folder.is_dir():
        raise Refusal(f"{shown(folder)} is a file; choose a folder for --tokens")
    if (folder / "manifest.json").exists():
        return
    for name in PARTS:
        if (folder / name).exists():
            raise Refusal(f"{shown(folder)} holds a {name} that is not ours; choose another --tokens folder")


def fingerprints(files, cache, main=True):
    """[[size, SHA-256]] of files: what they are, wherever they lie.

    Reading some hundred gigabytes takes minutes. So the main process remembers a digest, in the file `cache`, for as
    long as path, size and times of change stay what they are. Where that cannot be written, files are read each time.
    """
    known = read_cache(cache)
    missing = [path for path in files if stamp(path) not in known]
    total = sum(path.stat().st_size for path in missing)
    with tqdm(total=total, unit="B", unit_scale=True, desc="digest", leave=False, disable=total < 2**28) as bar:
        found = {stamp(path): digest(path, bar.update) for path in missing}
    if found and main:
        with suppress(Refusal, OSError), claim(cache.parent, wait=True):
            write_atomically(cache, json.dumps(read_cache(cache) | found, indent=1).encode())
    known |= found
    return [[path.stat().st_size, known[stamp(path)]] for path in files]


def read_cache(path):
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}


def stamp(path):
    """Path, size and times of change, as one text."""
    about = path.stat()
    return f"{os.path.realpath(path)}:{about.st_size}:{about.st_mtime_ns}:{about.st_ctime_ns}"


def digest(path, progress):
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            found.update(piece)
            progress(len(piece))
    return found.hexdigest()


def read_manifest(folder, wanted):
    """The manifest of a folder, a fresh one if there is none; Refusal if it was made from or with something else."""
    path = folder / "manifest.json"
    if not path.exists():
        empty = {"complete": False, "at": [0, 0], "sizes": dict.fromkeys(PARTS, 0), "names": []}
        return wanted | empty | {"subsets": {"train": {}, "valid": {}}, "zero_bytes": 0, "problems": {}}
    try:
        manifest = json.loads(path.read_bytes())
        differs = [name for name in wanted if manifest[name] != wanted[name]]
    except (ValueError, KeyError, TypeError):
        raise Refusal(f"{path}: not a manifest of this program; choose another --tokens folder") from None
    if differs:
        raise Refusal(f"{folder} was made with other {differs[0]}; choose another --tokens folder or delete it")
    return manifest


def write_tokens(folder, manifest, files, vocabulary):
    """Tokenise what the manifest does not have yet. Raises Refusal if there is not one document."""
    sizes = [size for size, _ in manifest["sources"]]
    write_atomically(folder / "manifest.json", json.dumps(manifest, indent=1).encode())  # first: the folder is ours
    with ExitStack() as stack, tqdm(total=sum(sizes), unit="B", unit_scale=True, desc="tokenise") as bar:
        parts = {name: stack.enter_context(open(folder / name, "ab")) for name in PARTS}
        for name, file in parts.items():
            file.truncate(manifest["sizes"][name])
            file.seek(0, os.SEEK_END)
        problems = Problems(manifest["problems"], parts["problems.txt"])
        bar.update(sum(sizes[: manifest["at"][0]]))
        since = 0  # bytes of text since the last commit
        for place, text, subset in documents(files, problems, manifest["at"], bar.update):
            since += add_document(manifest, parts, text, subset, vocabulary)
            if since > COMMIT:
                commit(folder, manifest | {"at": place, "problems": problems.counts}, parts)
                since = 0
        if not manifest["names"]:
            more = " ..." if files[3:] else ""
            raise Refusal(f"not one document in {', '.join(map(shown, files[:3]))}{more}")
        commit(folder, manifest | {"complete": True, "at": [len(files), 0], "problems": problems.counts}, parts)


def add_document(manifest, parts, text, subset, vocabulary):
    """Append one document, its separator, its row and its counts; returns its bytes."""
    split = "valid" if is_validation(text, manifest["valid share"]) else "train"
    ids, num_bytes, zeros = vocabulary.encode(text)
    dtype = token_type(vocabulary.size)
    if subset not in manifest["names"]:
        manifest["names"].append(subset)
    start = parts[f"{split}.bin"].tell() // dtype.itemsize
    row = np.array([start, len(ids), num_bytes, manifest["names"].index(subset)], dtype=np.int64)
    parts[f"{split}.bin"].write(np.append(ids, vocabulary.separator).astype(dtype).tobytes())
    parts[f"{split}.docs"].write(row.tobytes())
    counts = manifest["subsets"][split].setdefault(subset, {"documents": 0, "tokens": 0, "bytes": 0})
    counts["documents"] += 1
    counts["tokens"] += len(ids)
    counts["bytes"] += num_bytes
    manifest["zero_bytes"] += zeros
    return num_bytes


def commit(folder, manifest, parts):
    """Files first, then the manifest that vouches for them."""
    for file in parts.values():
        file.flush()
        os.fsync(file.fileno())
    sizes = {name: file.tell() for name, file in parts.items()}
    write_atomically(folder / "manifest.json", json.dumps(manifest | {"sizes": sizes}, indent=1).encode())


def open_tokens(folder, manifest, vocabulary, notes):
    """Map the files of a complete manifest. Raises Refusal if one does not have its size."""
    def load(name, dtype):
        path = folder / name
        size = manifest["sizes"][name]
        if not path.exists() or path.stat().st_size != size:
            raise Refusal(f"{path} does not have the {size:,} bytes of its manifest; delete {folder} and start again")
        return np.memmap(path, dtype, "r") if size else np.zeros(0, dtype)

    dtype = token_type(vocabulary.size)
    docs = load("valid.docs", np.dtype(np.int64)).reshape(-1, 4)
    return Tokens(manifest, load("train.bin", dtype), load("valid.bin", dtype), docs, vocabulary, notes)


def refuse_cut(tokens):
    """Raises Refusal if the file of a memory map is shorter than the map: to read beyond its end kills a process."""
    file = getattr(tokens, "filename", None)
    if file and (not os.path.exists(file) or os.path.getsize(file) < tokens.nbytes):
        raise Refusal(f"{shown(file)} has been cut short: delete {shown(Path(file).parent)}, then go on with --resume")


def first_documents(data, limit):
    """The first validation documents, about `limit` tokens: (a separator and their tokens, their rows of valid_docs).

    Raises Refusal if there is none.
    """
    refuse_cut(data.valid)
    refuse_cut(data.valid_docs)
    docs = np.array(data.valid_docs)  # (documents, 4): start, tokens, bytes, subset
    if not len(docs):
        raise Refusal("no document fell into the validation part; give more documents or a larger valid_share")
    docs = docs[: max(1, np.searchsorted(docs[:, 0], limit))]
    end = docs[-1, 0] + docs[-1, 1] + 1
    return np.append([data.vocabulary.separator], data.valid[:end]), docs


def subsets_of(docs, data):
    """Yields (name, is_text, bytes, zlib's bits per byte) for each subset among these documents, at last for "all".

    is_text (n,) bool: which tokens of the documents are text of this subset. The ends of documents are no text.
    """
    subset = np.repeat(docs[:, 3], docs[:, 1] + 1)  # of every token
    is_text = np.ones(len(subset), dtype=bool)
    is_text[docs[:, 0] + docs[:, 1]] = False
    compressed = 0.0
    for i in np.unique(subset).tolist():
        mine = docs[docs[:, 3] == i]
        num_bytes = int(mine[:, 2].sum())
        bits = zlib_bits(data, mine) or 0.0
        compressed += bits * num_bytes
        yield data.manifest["names"][i], is_text & (subset == i), num_bytes, bits
    num_bytes = int(docs[:, 2].sum())
    yield "all", is_text, num_bytes, compressed / max(1, num_bytes)


# What the tokens hold
def zlib_bits(data, rows):
    """Bits per byte that zlib needs for these documents, rows of data.valid_docs; None if there are none.

    zlib knows nothing of language; it replaces what occurred in the 32 KB before. So it is the mark for a model.
    """
    refuse_cut(data.valid)
    texts = [data.vocabulary.decode(data.valid[start : start + n].tolist()) for start, n, _, _ in rows.tolist()]
    num_bytes = int(rows[:, 2].sum())
    return 8 * len(zlib.compress("\n".join(texts).encode("utf-8"), 9)) / num_bytes if num_bytes else None


def print_subsets(data):
    """A row for each subset, then what could not be used. zlib: of at most a thousand validation documents."""
    refuse_cut(data.valid_docs)
    docs = np.array(data.valid_docs)
    print(f"{'':24}{'training':>24}{'validation':>24}{'bytes':>10}{'zlib, bits':>12}")
    print(f"{'subset':24}{'documents':>10}{'bytes':>14}{'documents':>12}{'bytes':>12}{'a token':>10}{'a byte':>12}")
    nothing = {"documents": 0, "tokens": 0, "bytes": 0}
    for i, name in enumerate(data.manifest["names"]):
        train = data.manifest["subsets"]["train"].get(name, nothing)
        valid = data.manifest["subsets"]["valid"].get(name, nothing)
        rate = (train["bytes"] + valid["bytes"]) / max(1, train["tokens"] + valid["tokens"])
        bits = zlib_bits(data, docs[docs[:, 3] == i][:1000])
        mark = "–" if bits is None else f"{bits:.3f}"
        print(f"{name[:23]:24}{train['documents']:10,}{train['bytes']:14,}", end="")
        print(f"{valid['documents']:12,}{valid['bytes']:12,}{rate:10.2f}{mark:>12}")
    if not len(docs):
        print("no document fell into the validation part: give more documents or a larger valid_share")
    lost = data.manifest["problems"] | {"zero bytes": data.manifest["zero_bytes"]}
    told = [f"{count:,} × {reason}" for reason, count in lost.items() if count]
    print(f"not used: {', '.join(told) or 'nothing'}")
    for note in data.notes:
        print(note)
    print()
