"""Text out of a checkpoint of 05, and the state of a document that is read once and continued many times.

  python -m experiments.pile_sample "import "                                  from runs/pile/rebased/checkpoint.pt
  python -m experiments.pile_sample "Then " --document book.txt
  python -m experiments.pile_sample --document book.txt --save-state book.pt   read a long text once ...
  python -m experiments.pile_sample "Then " --load-state book.pt               ... and continue it as often as you like

A prompt is read by the chunked form, then every token costs one step. The state of a kernel model is a value of
constant size, whatever it has read; softmax keeps all keys and values.
"""

import argparse
import hashlib
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from rebased import files, kernels, lesson, linear_attention, pile_run, pile_settings
from rebased import model as models
from rebased.lesson import Refusal
from rebased.tokens import TOKENIZERS, identity, make_vocabulary

def load_model(path, device="cpu", tokenizer_file=None):
    """(model, vocabulary) of a checkpoint. Raises Refusal for what is none, damaged, or made with another tokenizer."""
    content = pile_run.load_checkpoint(path)
    name = content["tokenizer"].get("name")
    if name not in TOKENIZERS:
        raise Refusal(f"{path} names the tokenizer {name!r}, which is none of {', '.join(TOKENIZERS)}")
    vocabulary = make_vocabulary(name, tokenizer_file)
    if identity(vocabulary) != content["tokenizer"]:
        raise Refusal(f"{path} was trained with another {vocabulary.name} tokenizer; give its --tokenizer-file")
    try:
        model = models.LanguageModel(models.ModelConfig(**content["config"]))
        model.load_state_dict(content["model"])
    except (TypeError, ValueError, RuntimeError) as error:  # a mixer that is not known here, say
        raise Refusal(f"{path} holds a model that cannot be made here: {str(error).splitlines()[0]}") from None
    return model.to(device).eval(), vocabulary


# Text
@torch.no_grad()
def read_context(model, ids, states=None, piece=8192):
    """Take ids (1, n) into the states, some thousand tokens at a time."""
    for begin in range(0, ids.shape[1], piece):
        _, states = model.prefill(ids[:, begin : begin + piece], states)
    return states


def stream_text(model, vocabulary, ids, length, temperature, top_k=None, states=None):
    """Continue ids (a list, at least one): yields pieces of text until a separator is chosen or `length` tokens are.

    Some tokenizers write a space as part of the word behind it, and drop it where a text begins. So new tokens are not
    decoded alone but behind the last ones, and what is new in that text is yielded.
    """
    window = ids[-16:]
    told = vocabulary.decode(window)
    waiting = 0  # tokens that are part of a character
    tokens = torch.tensor([ids], device=model.embedding.weight.device)
    states = read_context(model, tokens[:, :-1], states)
    for token in models.generate(model, tokens[:, -1:], length, temperature, top_k, states):
        if token.item() == vocabulary.separator:
            break
        window.append(token.item())
        text = vocabulary.decode(window)
        waiting += 1
        if text.endswith("\ufffd") and waiting < 8:
            continue
        yield text[len(told) :]
        window = window[-16:]
        told = vocabulary.decode(window)
        waiting = 0
    if waiting:
        yield vocabulary.decode(window)[len(told) :]


# States
def model_digest(model):
    """Which weights a state belongs to."""
    found = hashlib.sha256()
    for parameter in model.parameters():
        found.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def save_state(path, model, states, ids):
    """The States and the tokens not yet taken into them, as tensors and plain types: no class of ours."""
    layers = [state if isinstance(state, torch.Tensor) else tuple(state) for state in states.layers]
    files.save_tensors(path, {"state_of": model_digest(model), "layers": layers, "length": states.length, "ids": ids})


def load_state(path, model):
    """-> (States, ids) of `save_state`. Raises Refusal for another model's, and for what is no state or damaged."""
    content = files.load_tensors(path)
    if "state_of" not in content:
        raise Refusal(f"{path}: not a saved state")
    if content["state_of"] != model_digest(model):
        raise Refusal(f"{path} is the state of another model; read the document again with this one")
    layers = []
    for name, state in zip(model.config.mixers, content["layers"], strict=True):
        device = model.embedding.weight.device
        state = state.to(device) if isinstance(state, torch.Tensor) else tuple(part.to(device) for part in state)
        layers.append(linear_attention.State(*state) if name in kernels.KERNELS else state)
    return models.States(layers, content["length"]), content["ids"]


# The command line
def read_options(argv=None):
    parser = argparse.ArgumentParser(description="sample from a checkpoint of 05_train_pile.py")
    parser.add_argument("prompt", nargs="?", help="the text to continue")
    parser.add_argument("--checkpoint", type=Path, default="runs/pile/rebased/checkpoint.pt", help="(%(default)s)")
    parser.add_argument("--document", type=Path, help="a text to read before the prompt")
    parser.add_argument("--save-state", type=lesson.writable_path, help="keep the state after the document")
    parser.add_argument("--load-state", type=Path, help="go on from such a state")
    parser.add_argument("--length", type=lesson.positive_integer, default=300, help="tokens to generate (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest (%(default)s)")
    parser.add_argument("--top-k", type=lesson.positive_integer, help="choose among the likeliest k only")
    parser.add_argument("--seed", type=lesson.seed_number, default=0, help="(%(default)s)")
    parser.add_argument("--device", help="cpu, cuda, ... (cuda if there is one)")
    parser.add_argument("--tokenizer-file", type=Path, help="a local tokenizer.json")
    options = lesson.parse_arguments(parser, argv)
    if options.prompt is None and not options.save_state:
        raise Refusal("a document or a state alone asks for nothing: add a prompt or --save-state FILE")
    if not 0 <= options.temperature < float("inf"):
        raise Refusal(f"--temperature must be 0 or more, got {options.temperature}")
    return options


def main(argv=None):
    """What the options ask for. Raises Refusal."""
    options = read_options(argv)
    device = pile_settings.find_device(options.device)
    model, vocabulary = load_model(options.checkpoint, device, options.tokenizer_file)
    torch.manual_seed(options.seed)
    states = None
    ids = [vocabulary.separator]
    if options.load_state:
        states, ids = load_state(options.load_state, model)
    if options.document:
        ids = ids + vocabulary.encode(options.document.read_text(encoding="utf-8", errors="replace"))[0].tolist()
    if options.save_state:
        if len(ids) == 1:
            raise Refusal("--save-state needs a --document to read")
        states = read_context(model, torch.tensor([ids[:-1]], device=device), states)
        ids = ids[-1:]  # the last token is not taken in: it predicts what follows
        save_state(options.save_state, model, states, ids)
        size = models.state_bytes(states.layers)
        print(f"{states.length:,} tokens read; state of {size:,} bytes in {options.save_state}")
    if options.prompt is not None:
        ids = ids + vocabulary.encode(options.prompt)[0].tolist()
        print(options.prompt, end="", flush=True)
        for text in stream_text(model, vocabulary, ids, options.length, options.temperature, options.top_k, states):
            print(lesson.printable(text), end="", flush=True)
        print()


if __name__ == "__main__":
    lesson.obey(main, "nothing is lost: a state is written at once or not at all")
