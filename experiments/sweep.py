"""What lets a long list of runs be cut anywhere and divided over machines: checkpoints and shards.

An interruption at any moment (Ctrl-C, `kill -9`, a full disk) costs at most the epoch that was under way. The runs
themselves are distributed by rebased/workers.py, their rows written by rebased/files.py.
"""

from hashlib import sha256

from rebased import files, lesson

# Checkpoints: an epoch is never trained twice. They lie beside the rows and go when the run has its row.
def checkpoint_path(rows_path, key):
    """Where the run called `key` keeps its checkpoint: one name for each run and its settings."""
    folder = rows_path.with_name(rows_path.name + ".unfinished")
    return folder / (sha256(key.encode()).hexdigest()[:16] + ".pt")


def load_checkpoint(path):
    """What `files.save_tensors` wrote; None if there is none, or a damaged one: the run then starts anew."""
    try:
        return files.load_tensors(path)
    except lesson.Refusal:
        return None


def remove_checkpoint(path):
    """Forget a finished run; the last one takes the folder along."""
    path.unlink(missing_ok=True)
    if path.parent.exists() and not any(path.parent.iterdir()):
        path.parent.rmdir()


# Shards
def shard(items, part):
    """Every n-th item, from the i-th on: part = (i, n), i from 1 to n. The n shards are disjoint and complete."""
    i, n = part
    return items[i - 1 :: n]
