"""The command line of 04: which runs, and where their results go."""

import argparse

from rebased import lesson

def read_options(mixers, default_mixers, run, steps, argv=None):
    """The options of 04. Ends with one line for what cannot be run, before anything is trained.

    mixers: the names to choose from; run: the class of runs, with its defaults; steps: of training, by default.
    """
    count = lesson.positive_integer
    parser = argparse.ArgumentParser(description="04: train on associative recall, test longer")
    add = parser.add_argument
    add("--mixers", nargs="+", choices=mixers, default=default_mixers, metavar="MIXER",
        help=f"from {', '.join(mixers)}; conv_attention is softmax (%(default)s)")
    add("--seeds", nargs="+", type=lesson.seed_number, default=[0, 1, 2, 3, 4], metavar="SEED", help="(%(default)s)")
    add("--steps", type=count, default=steps, help="of training (%(default)s)")
    add("--lengths", nargs="+", type=count, default=list(run.test_lengths), metavar="T",
        help="contexts to test at (%(default)s)")
    add("--workers", type=count, default=lesson.usable_cores(), help="processes (%(default)s)")
    add("--output", type=lesson.writable_path, default="runs/mqar.jsonl", help="(%(default)s)")
    add("--figure", type=lesson.figure_path, default="runs/mqar.png", help="(%(default)s)")
    options = lesson.parse_arguments(parser, argv)
    if options.output.resolve() == options.figure.resolve():
        parser.error(f"--output and --figure are both {options.figure}; rows need a file of theirs")
    options.lengths = sorted(set(options.lengths))
    if options.lengths[0] < 4 * run.pairs:
        parser.error(f"--lengths: {run.pairs} pairs and their queries need {4 * run.pairs} places")
    return options
