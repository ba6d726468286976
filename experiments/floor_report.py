"""Tables and the figure of experiments/floor.py, from rows alone."""


def report(rows, searched):
    """Print how many rows each part has."""
    for part, own in rows.items():
        print(part, len(own))


def draw(rows, path):
    """To be drawn."""
