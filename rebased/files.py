"""Files that are whole or not there: atomic writes, tensors, a lock, and results as rows, one JSON object a line."""

import errno
import hashlib
import io
import json
import os
import sys

import torch

from rebased.lesson import Refusal

def write_atomically(path, data):
    """Write bytes under another name, flush them to the disk, then rename: whoever looks sees the old or the new.

    Raises Refusal, in one line, if the file cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        kept = "; the one before is intact" if path.exists() else ""
        raise Refusal(f"cannot write {path}: {error.strerror}{kept}") from None


def save_tensors(path, content):
    """Write a dictionary of tensors and plain types, as torch.save does, with the SHA-256 of it all at the end.

    The file is an ordinary one for torch.load, which looks past the last 32 bytes.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    buffer.write(hashlib.sha256(buffer.getbuffer()).digest())
    write_atomically(path, buffer.getbuffer())


def load_tensors(path):
    """What `save_tensors` wrote, on the CPU. Loading runs no code.

    torch.load alone takes nine of ten files with one flipped bit for good; the digest gives them away.
    Raises Refusal for a file that is missing, damaged, or something else.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise Refusal(f"{path}: no such file") from None
    if hashlib.sha256(memoryview(data)[:-32]).digest() != data[-32:]:
        raise Refusal(f"{path}: damaged, or not written by this program (its digest is wrong)")
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception:  # whatever zip and pickle raise about a file that is none of ours
        content = None
    if not isinstance(content, dict):
        raise Refusal(f"{path}: not a file of this program")
    return content


# Not every file system has locks: network disks and containers answer so
WITHOUT_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}


def claim(folder, wait=False):
    """A lock on a folder, made if missing, until the file returned is closed or the process dies.

    Where another process holds it: wait for that one, or raise Refusal. Where there are no locks, say so and go on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / "lock", "w", encoding="utf-8")
    try:
        import fcntl
    except ImportError:  # Windows has no such lock and goes without
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            file.close()
            raise Refusal(f"another run is writing to {folder}; wait for it or choose another folder") from None
        print(f"another run is writing to {folder}; waiting for it", file=sys.stderr)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            file.close()
            raise
        print(f"{folder} cannot be locked here ({error.strerror}): see that no other run writes to it", file=sys.stderr)
    return file


def append_row(path, row):
    """Add a dictionary as one line of JSON that is on the disk when this returns.

    Half a line at the end of the file, left by a machine that went down while writing, is cut off first.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise Refusal(f"cannot write {path}: {error.strerror}; the rows that are there are kept") from None


def write_rows(path, rows):
    """The dictionaries as the whole content of a file, a line of JSON each."""
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


# What a row must hold under these names, wherever it has them
KINDS = {
    str: ("mixer", "role", "command", "date", "hardware"),
    int: ("seed", "steps", "length", "pairs", "d_model", "parameters", "tokens", "bytes"),
    (int, float, type(None)): ("learning_rate", "accuracy", "loss", "perplexity", "bits_per_byte", "zlib",
                               "tokens_per_s", "minutes"),
    dict: ("settings", "config", "cells", "cells_without_floor", "slices", "subsets"),
    list: ("curve", "by_position", "losses", "accuracies"),
}
NUMBERS = ("cells", "cells_without_floor", "slices", "subsets", "curve", "by_position", "losses", "accuracies")


def wrong_field(row):
    """The name of a field that holds what no program here writes there; None if all is well."""
    for kind, names in KINDS.items():
        for name in names:
            if name in row and (not isinstance(row[name], kind) or isinstance(row[name], bool)):
                return name
    for name in NUMBERS:
        if name in row and not only_numbers(row[name]):
            return name
    return None


def only_numbers(x):
    """Whether the leaves of dictionaries and lists are numbers, or None for what could not be measured."""
    if isinstance(x, dict):
        return all(map(only_numbers, x.values()))
    if isinstance(x, list):
        return all(map(only_numbers, x))
    return x is None or isinstance(x, (int, float))


def read_rows(path, fields=()):
    """The dictionaries of a file of rows; [] if there is no file. A torn last line counts as not written.

    A line that is there twice, as in files that were joined, counts once. Raises Refusal that names the first line
    which is no row, lacks one of `fields`, or holds a text where a number belongs.
    """
    if not path.exists():
        return []
    rows = []
    known = set()
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        if line in known:
            continue
        known.add(line)
        try:
            row = json.loads(line)
            missing = [field for field in fields if field not in row]
            wrong = wrong_field(row)
        except (ValueError, TypeError, RecursionError):
            raise Refusal(f"{path}, line {number} is not a row of results; mend it or choose another file") from None
        if missing:
            raise Refusal(f"{path}, line {number} has no {missing[0]!r}: a row of something else?")
        if wrong:
            raise Refusal(f"{path}, line {number}: {wrong!r} is {str(row[wrong])[:40]!r}, which is no result of ours")
        rows.append(row)
    return rows
