"""Files that are whole or not there: atomic writes, and results as rows, one JSON object a line."""

import json
import os

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


def read_rows(path, fields=()):
    """The dictionaries of a file of rows; [] if there is no file. A torn last line counts as not written.

    Raises Refusal that names the first line which is no row, or lacks one of `fields`.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        try:
            row = json.loads(line)
            missing = [field for field in fields if field not in row]
        except (ValueError, TypeError, RecursionError):
            raise Refusal(f"{path}, line {number} is not a row of results; mend it or choose another file") from None
        if missing:
            raise Refusal(f"{path}, line {number} has no {missing[0]!r}: a row of something else?")
        rows.append(row)
    return rows
