"""``python tools/tokenize.py MODEL --text T | --file F [--no-special]``: the ids of a text.

Prints one line like ``[1, 2, 3]``. MODEL is a GGUF file, one with only a vocabulary included, or a
folder with ``tokenizer.json`` or ``tokenizer.model``. Spelled-out special tokens are parsed;
``--no-special`` leaves out the BOS/EOS that the model's file asks for.
"""

import sys

if __name__ == "__main__":
    # Python puts the script's folder first, where this very file hides the standard library's
    # tokenize, which linecache, inspect and torch import.
    sys.path.pop(0)

import argparse
from collections.abc import Sequence
from pathlib import Path

from squall.loaders.errors import ModelLoadError
from squall.loaders.tokenizer import Tokenizer
from squall.loaders.tokenizers.gguf import gguf_tokenizer
from squall.loaders.tokenizers.hf import hf_tokenizer


def load_tokenizer(model: Path) -> Tokenizer:
    """The tokenizer of a GGUF file or of a model folder. Raises ModelLoadError."""
    if model.is_dir():
        return hf_tokenizer(model)
    if not model.exists():
        raise ModelLoadError(f"{model}: no such file or folder (a GGUF file or a model folder)")
    from squall.loaders.gguf import GGUFFile  # imports torch, which folders do not need

    return gguf_tokenizer(GGUFFile.open(model).metadata, model)


def read_text(path: Path) -> str:
    """The exact characters of a UTF-8 file. Raises ValueError, one line."""
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: byte {error.start} is {error.reason}") from None


def checked_argument(text: str) -> str:
    """``text`` as given on the command line. Raises ValueError if its bytes were not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"--text: not UTF-8 at character {error.start}") from None
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tokenize.py", description="Print the ids of a text.")
    parser.add_argument("model", type=Path, help="GGUF file or model folder")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", help="the text itself")
    source.add_argument("--file", type=Path, help="a UTF-8 file, taken byte for byte")
    parser.add_argument("--no-special", action="store_true", help="add no BOS and no EOS")
    options = parser.parse_args(arguments)
    try:
        given = options.text
        text = read_text(options.file) if given is None else checked_argument(given)
        tokenizer = load_tokenizer(options.model)
    except (ModelLoadError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(tokenizer.encode(text, add_special=not options.no_special))
    return 0


if __name__ == "__main__":
    sys.exit(main())
