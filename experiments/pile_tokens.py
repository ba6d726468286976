"""Tokenise files once, and show what they hold; 05_train_pile.py with the same --data then finds the tokens.

  python -m experiments.pile_tokens --data FOLDER      (.jsonl, .jsonl.zst, .jsonl.gz; seconds for Python's own text)

It may be killed at any moment: the same command goes on where it was.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from rebased import lesson
from rebased.tokens import TOKENIZERS, load_data, make_vocabulary, print_subsets

def main(argv=None):
    """Tokenise and print the table. Raises Refusal."""
    parser = argparse.ArgumentParser(description="tokenise files in the Pile's format, and show what they hold")
    parser.add_argument("--data", nargs="+", help="files or folders (default: the text that comes with Python)")
    parser.add_argument("--tokens", type=Path, help="folder for tokenised data (one in runs/tokens)")
    parser.add_argument("--tokenizer", choices=TOKENIZERS, default="bytes", help="(%(default)s)")
    parser.add_argument("--tokenizer-file", type=Path, help="a local tokenizer.json")
    parser.add_argument("--valid-share", type=float, default=0.05, help="of the documents (%(default)s)")
    options = lesson.parse_arguments(parser, argv)
    vocabulary = make_vocabulary(options.tokenizer, options.tokenizer_file)
    data = load_data(options.data, vocabulary, options.valid_share, options.tokens)
    print_subsets(data)
    print(f"{len(data.valid_docs):,} documents are validation and stay so, whatever files come beside them.")


if __name__ == "__main__":
    lesson.obey(main, "the same command goes on from there")
