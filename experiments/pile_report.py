"""The tables of 05 from rows alone, and how busy a run kept its GPUs.

  python -m experiments.pile_report results/pile_default.jsonl
  python -m experiments.pile_report runs/speed/results.jsonl --peak-tflops 989      (an H100 in bfloat16)

Utilisation is the model's own count of operations, in tokens per second, over what the hardware could do. A row for it:

  python 05_train_pile.py --preset paper --data FOLDER --out runs/speed \\
         --set tokenizer=bytes steps=20 warmup=2 micro_batch=4 batch_tokens=65536 eval_tokens=50000
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from rebased import files, kernels, lesson, pile_report
from rebased import model as models
from rebased.lesson import Refusal

NUMBER, MEASURED = files.NUMBER, files.MEASURED
POINTS = [[int, NUMBER], ...]
ROW = {
    **dict.fromkeys(("mixer", "command", "hardware", "date"), str),
    **dict.fromkeys(("parameters", "tokens", "bytes", "processes"), int),
    **dict.fromkeys(("loss", "perplexity", "bits_per_byte", "zlib", "tokens_per_s", "minutes"), NUMBER),
    "settings": dict.fromkeys(("steps", "batch_tokens", "seq_len"), int),
    "config": {
        "mixers": [str, ...],
        **dict.fromkeys(("vocab_size", "d_model", "heads", "feature_dim", "positions", "mlp"), int),
    },
    "slices": {files.EACH: {"share": NUMBER, "recall": MEASURED, "other": MEASURED}, "bigram": dict},
    "subsets": {files.EACH: {"bytes": int, "bits_per_byte": NUMBER, "zlib": NUMBER}},
    "curve": POINTS,
    "by_position": POINTS,
}


def flops_per_token(config, T):
    """Multiplications and additions of a training step per token: 6 a weight, and 3 times the mixers' forward."""
    features = config.feature_dim * (config.feature_dim + 1) // 2
    flops = 6 * models.count_parameters(config)
    for mixer in config.mixers:
        if mixer == "attention":
            flops += 3 * 2 * T * config.d_model  # every query meets T/2 keys, and as many values
        elif mixer in kernels.KERNELS:
            flops += 3 * 4 * features * config.d_model  # into the state and out of it
    return flops


def model_config(row, path):
    try:
        return models.ModelConfig(**row["config"] | {"mixers": tuple(row["config"]["mixers"])})
    except (TypeError, ValueError) as error:
        raise Refusal(f"{path}: the model of {row['mixer']!r} cannot be built: {error}") from None


def print_utilisation(rows, peak, path):
    """peak: TFLOP/s that one device can do; path: where the rows are from."""
    for row in rows:
        config = model_config(row, path)
        tflops = row["tokens_per_s"] * flops_per_token(config, row["settings"]["seq_len"]) / 1e12
        share = tflops / row["processes"] / peak
        print(f"{row['mixer']:20}{tflops:8.1f} TFLOP/s by the model's own count, {share:.1%} of the peak")


def main(argv=None):
    """The tables of a file of rows. Raises Refusal."""
    parser = argparse.ArgumentParser(description="tables of 05_train_pile.py from its rows")
    parser.add_argument("rows", type=Path, help="results.jsonl of a run")
    parser.add_argument("--peak-tflops", type=float, help="of one device, to print the utilisation (H100, bf16: 989)")
    parser.add_argument("--figure", type=lesson.figure_path, help="draw the curves there, too")
    options = lesson.parse_arguments(parser, argv)
    rows = files.read_rows(options.rows, ROW)
    if not rows:
        raise Refusal(f"{options.rows}: no rows there")
    for part in ("slices", "subsets"):
        if len({tuple(row[part]) for row in rows}) > 1:
            raise Refusal(f"{options.rows}: rows of different data, their {part} differ; one table needs one data set")
    print(f"{rows[0]['command']}   ({rows[0]['hardware']}, {rows[0]['date']}, {rows[0]['minutes']} minutes)\n")
    pile_report.print_tables(rows)
    pile_report.print_reading(rows)
    if options.peak_tflops:
        print_utilisation(rows, options.peak_tflops, options.rows)
    if options.figure:
        pile_report.draw(rows, options.figure)


if __name__ == "__main__":
    lesson.obey(main, "nothing is lost")
