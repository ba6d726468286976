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


# Shapes of rows: what their readers find in them
# A shape is a type, or what is inside: [shape] is a list of any length, [shape, ...] one that is not empty, and
# [shape, shape] one of two items; {name: shape} is a dictionary with these names, with "name?" for one that may be
# missing, and EACH for all names. (shape, shape) is either of them.
EACH = "each"
NUMBER = (int, float)
MEASURED = (int, float, type(None))  # None: there was nothing to measure
CELL = {"accuracy": NUMBER, "right": NUMBER, "others": NUMBER, "filler": NUMBER}
RECALL = {  # a row of 04
    "mixer": str,
    "seed": int,
    "test_lengths?": [int, ...],
    "cells": {EACH: CELL},
    "cells_without_floor?": {EACH: CELL},
}


class Misfit(ValueError):
    """Says where a value is not of a shape."""


def check_shape(value, shape, place=""):
    """Raise Misfit unless a value is of a shape; place: where it stands, as it would be written in Python."""
    if isinstance(shape, dict) and isinstance(value, dict):
        for name, inner in shape.items():
            names = value if name == EACH else [name.removesuffix("?")]
            for key in names:
                if key in value:
                    check_shape(value[key], inner, f"{place}[{key!r}]" if place else key)
                elif not name.endswith("?"):
                    raise Misfit(f"{place or 'the row'} has no {key!r}")
    elif isinstance(shape, list) and isinstance(value, list) and length_fits(value, shape):
        items = [one for one in shape if one is not ...]
        for number, item in enumerate(value):
            check_shape(item, items[number % len(items)], f"{place}[{number}]")
    elif isinstance(shape, tuple):
        if not any(fits(value, one) for one in shape):
            raise Misfit(f"{place} is {str(value)[:40]!r}")
    elif not isinstance(shape, type) or not is_of_type(value, shape):
        raise Misfit(f"{place} is {str(value)[:40]!r}")


def length_fits(value, shape):
    """Of a list."""
    if shape[-1] is ...:
        return len(value) > 0
    return len(shape) in (1, len(value))


def is_of_type(value, kind):
    """True and False are no numbers."""
    return isinstance(value, kind) and (not isinstance(value, bool) or kind in (bool, object))


def fits(value, shape):
    """Whether a value is of a shape."""
    try:
        check_shape(value, shape)
    except Misfit:
        return False
    return True


def check_cells(row):
    """Raise Misfit unless each length of `test_lengths` has its two cells: official queries, and uniform ones."""
    for field in ("cells", "cells_without_floor"):
        for length in row.get("test_lengths", []) if field in row else []:
            for cell in (f"{length} official", f"{length} uniform"):
                if cell not in row[field]:
                    raise Misfit(f"{field} has no {cell!r}")


def read_rows(path, shape=()):
    """The dictionaries of a file of rows; [] if there is no file. A torn last line counts as not written.

    shape: what a row must hold: names, or a dictionary {name: shape} as above. A line that is there twice, as in files
    that were joined, counts once. Raises Refusal that names the first line which is no row, and what is wrong inside.
    """
    if not isinstance(shape, dict):
        shape = dict.fromkeys(shape, object)
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
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise Refusal(f"{path}, line {number} is not a row of results; mend it or choose another file")
        try:
            check_shape(row, shape)
            if "test_lengths?" in shape:
                check_cells(row)
        except Misfit as misfit:
            raise Refusal(f"{path}, line {number}: {misfit}; mend it or choose another file") from None
        rows.append(row)
    return rows
