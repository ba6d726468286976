"""Files in the Pile's format, which may be broken, to documents.

A line is {"text": ..., "meta": {"pile_set_name": ...}}. Mirrors of the Pile differ: they say `contents` and `metadata`,
write the metadata as a JSON string, put a list into it or leave it out. And files of this size do arrive broken. The
rules: a line that cannot be used is skipped, counted, and named with file and line; a compressed file that ends too
early gives what came before; blank lines are nothing; a file that is left out is named. Reading stops only where a file
cannot be opened.

    for text, subset in read_documents(["FOLDER", "more.jsonl.zst"]): ...

Without files of one's own there is `write_library`: the text that comes with every Python, in the same format.
"""

import gzip
import hashlib
import json
import os
import re
import sys
import sysconfig
import zlib
from collections import Counter
from importlib import import_module
from pathlib import Path

from tqdm import tqdm

from rebased.files import write_atomically
from rebased.lesson import Refusal

SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz")
LONGEST_LINE = 64 * 2**20  # bytes; longer lines are passed over without being held
# Names of a part that is kept from training, and of its pieces: val.jsonl, validation-00000-of-00002.jsonl, folder test
SPLIT = r"(val|valid|validation|test)([-_. ]?(\d|of|part|shard|set|split|data))*"
NOT_FOR_TRAINING = re.compile(SPLIT + r"(\.jsonl(\.zst|\.gz)?)?", re.IGNORECASE)
# Names that only may be such: tests, for one, are also texts like others. They are read, and it is said.
DOUBTFUL = re.compile(r"(?<![a-z])(val|valid|validation|tests?|testing|dev|eval|evaluation|held-?out)(?![a-z])",
                      re.IGNORECASE)


class Damaged(Exception):
    """A compressed stream cannot be read further."""


def optional(name, purpose):
    """Import a library that only some commands need. Raises Refusal, with the command that installs it."""
    try:
        return import_module(name)
    except ImportError:
        raise Refusal(f"{purpose} needs {name}: pip install {name}") from None


class Problems:
    """What could not be used: every case to `file`, the first three of each kind to the screen, and the counts."""

    def __init__(self, counts=(), file=None):
        self.counts = Counter(dict(counts))
        self.file = file

    def add(self, path, line, reason):
        self.counts[reason] += 1
        if self.file:
            # A file's name need not be UTF-8: fsencode gives back the very bytes it is made of.
            self.file.write(os.fsencode(path) + f":{line}: {reason}\n".encode())
        if self.counts[reason] <= 3:
            more = "; further ones are only counted" if self.counts[reason] == 3 else ""
            tqdm.write(f"skipped {shown(path)}:{line}: {reason}{more}", file=sys.stderr)


def shown(path):
    """The path as it can be printed anywhere."""
    return os.fsencode(path).decode("utf-8", "replace")


# Which files
def find_files(paths, notes=None):
    """Files and folders -> a list of files, those of a folder in the order of their names.

    A folder is read with all folders in it, also those that are links; a file that is reached twice is read once.
    In a folder, files and folders with the names of validation and test parts are left out, for they must not be
    trained on; give such a one by its own name to read it. What is left out, and what is read although its name may
    mean the same, is told in lines that are appended to the list `notes`.
    Raises Refusal for a path that does not exist, a folder with nothing to read, a file of another kind.
    """
    notes = [] if notes is None else notes
    files = {}  # the real path -> the path as it was found
    for path in map(Path, paths):
        if not path.exists():
            raise Refusal(f"{shown(path)}: no such file or folder")
        if path.is_dir():
            found = files_of_folder(path, notes)
        elif has_suffix(path) and path.is_file():
            found = [path]
        else:
            raise Refusal(f"{shown(path)}: cannot read this kind of file; convert it to one of {', '.join(SUFFIXES)}")
        for file in found:
            files.setdefault(os.path.realpath(file), file)
    return list(files.values())


def has_suffix(path):
    return path.name.lower().endswith(SUFFIXES)


def files_of_folder(folder, notes):
    """The files in a folder to train on; what is left out goes to `notes`. Raises Refusal if none is left."""
    found = []
    others = Counter()
    before = len(notes)
    for path in walk(folder, notes):
        if not has_suffix(path):
            others[path.suffix or path.name] += 1
        elif not path.is_file():  # a link to nothing, a pipe
            notes.append(f"left out {shown(path)}: no file that can be read")
        elif NOT_FOR_TRAINING.fullmatch(path.name):
            notes.append(left_out(path, "file"))
        else:
            found.append(path)
    if others:
        kinds = ", ".join(f"{count} × {shown(kind)}" for kind, count in others.most_common(5))
        notes.append(f"left out in {shown(folder)}, not of the kinds {', '.join(SUFFIXES)}: {kinds}")
    if not found:
        nothing = f"{shown(folder)}: no {', '.join(SUFFIXES)} files to train on in this folder"
        raise Refusal("\n".join([nothing, *notes[before:][:1]]))
    found.sort()
    doubtful = [path for path in found if DOUBTFUL.search(str(path.relative_to(folder)))]
    if doubtful:
        more = f" and {len(doubtful) - 1} more" if doubtful[1:] else ""
        notes.append(f"read {shown(doubtful[0])}{more}: perhaps not for training, by its name; if so, name the others")
    return found


def left_out(path, kind):
    return f"left out {shown(path)}: not for training, by its name; to train on it, name the {kind} itself"


def walk(folder, notes):
    """Every file below a folder, through links to folders too, but into no folder twice: links may run in a circle.

    Folders that are left out by their names go to `notes`.
    """
    visited = {os.path.realpath(folder)}
    for place, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        new = []
        for name in sorted(folders):
            real = os.path.realpath(os.path.join(place, name))
            if NOT_FOR_TRAINING.fullmatch(name):
                notes.append(left_out(Path(place, name), "folder"))
            elif real not in visited:
                visited.add(real)
                new.append(name)
        folders[:] = new  # os.walk goes into these only
        for name in names:
            yield Path(place, name)


def refuse(error):
    """os.walk would pass over a folder that it cannot open."""
    raise error


# From bytes to lines
def zst_pieces(raw):
    """Decompress one frame after another. 2 KB at a time: even the most compressed input stays below 64 MB a piece."""
    zstandard = optional("zstandard", "reading .zst files")
    decoder = zstandard.ZstdDecompressor(max_window_size=2**31)  # the Pile's files need more than the default allows
    frame = None
    rest = b""
    while chunk := rest or raw.read(2048):
        frame = frame or decoder.decompressobj()
        try:
            yield frame.decompress(chunk)
        except zstandard.ZstdError:
            raise Damaged("the compressed data is damaged from here on") from None
        rest = b""
        if frame.eof:
            rest = frame.unused_data  # the beginning of the next frame
            frame = None
    if frame:
        raise Damaged("the file ends in the middle of its compressed data")


def plain_pieces(stream):
    """A megabyte at a time, or what is there."""
    while piece := stream.read1(2**20):
        yield piece


def pieces(path, progress):
    """The decompressed bytes of a file, piece by piece; `progress` is told how many bytes of the file that took.

    Raises Damaged where a compressed file cannot be read further.
    """
    kind = path.suffix.lower()
    with open(path, "rb") as raw:
        if kind == ".zst":
            stream = zst_pieces(raw)
        elif kind == ".gz":
            stream = plain_pieces(gzip.open(raw))
        else:
            stream = plain_pieces(raw)
        at = 0
        try:
            for piece in stream:
                yield piece
                progress(raw.tell() - at)
                at = raw.tell()
        except EOFError:
            raise Damaged("the file ends in the middle of its compressed data") from None
        except (gzip.BadGzipFile, zlib.error):
            raise Damaged("the compressed data is damaged from here on") from None


def lines(stream):
    """Pieces of bytes -> (line number from 1, line), with None for a line over LONGEST_LINE, which is never held."""
    number = 1
    parts = []  # of the line that has begun
    size = 0
    for piece in stream:
        *ended, rest = piece.split(b"\n")
        for part in ended:
            yield number, joined(parts, part, size + len(part))
            number += 1
            parts = []
            size = 0
        size += len(rest)
        parts.append(rest)
        if size > LONGEST_LINE:
            parts = []
    if size:
        yield number, joined(parts, b"", size)


def joined(parts, last, size):
    return b"".join([*parts, last]) if size <= LONGEST_LINE else None


# From lines to documents
def first(x):
    """The first entry of a list (of lists ...), None of an empty one; what is no list stays as it is."""
    while isinstance(x, list):
        x = x[0] if x else None
    return x


def subset_of(meta):
    """The name of the subset in the metadata, whichever way it is written; "unknown" without one."""
    if isinstance(meta, str):
        try:
            meta = json.loads(meta)
        except (ValueError, RecursionError):
            return "unknown"
    meta = first(meta)
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
    if not isinstance(text, str):
        raise ValueError("the text is no string")
    if not text:
        raise ValueError("an empty document")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair, which is no text") from None
    return text, subset_of(item.get("meta", item.get("metadata")))


def documents(files, problems, start=(0, 0), progress=lambda n: None):
    """Yields ((file, line), text, subset) for what comes after place `start`."""
    for i in range(start[0], len(files)):
        number = 0
        try:
            for number, line in lines(pieces(files[i], progress)):
                known = (i, number) <= tuple(start)
                blank = line is not None and not line.strip()
                if known or blank:
                    continue
                try:
                    text, subset = parse(line)
                except ValueError as error:
                    problems.add(files[i], number, str(error))
                else:
                    yield (i, number), text, subset
            if number == 0:
                problems.add(files[i], 1, "an empty file")
        except Damaged as error:
            problems.add(files[i], number + 1, str(error))


def read_documents(paths, problems=None):
    """Files or folders -> an iterator of (text, subset). Problems are counted in `problems`. Raises Refusal."""
    problems = Problems() if problems is None else problems
    notes = []
    files = find_files(paths, notes)
    for note in notes:
        print(note, file=sys.stderr)
    for _, text, subset in documents(files, problems):
        yield text, subset


# Text that comes with every Python: the standard library's sources and the texts of its help(), with subsets. Files of
# more than 16 KB stay out, so that a short validation has many documents. Another version of Python has other text:
# compare numbers within one version.
def library_documents():
    """Yields (text, subset): Library and Tests from source files, Help from what help("if") and the like show."""
    from pydoc_data.topics import topics

    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        # pydoc_data holds the texts of help(), which come below; encodings holds tables of numbers
        if "site-packages" in parts or parts[0] in ("pydoc_data", "encodings") or path.stat().st_size > 2**14:
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:  # the tests of Python hold files that are wrong on purpose
            continue
        yield text, "Tests" if {"test", "tests", "idle_test"} & set(parts) else "Library"
    for text in topics.values():
        yield text, "Help"


def write_library(path):
    """Write those documents to a .jsonl file, each once, in an order that only their content decides."""
    found = {}
    for text, subset in library_documents():
        if text:
            found[hashlib.sha256(text.encode("utf-8")).digest()] = {"text": text, "meta": {"pile_set_name": subset}}
    rows = [json.dumps(found[digest]) + "\n" for digest in sorted(found)]
    write_atomically(path, "".join(rows).encode("utf-8"))
