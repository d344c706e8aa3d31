"""The tokenizer a GGUF file describes in its metadata."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from squall.loaders.tokenizer import Tokenizer
from squall.loaders.tokenizers.bpe import BpeTokenizer
from squall.loaders.tokenizers.pretokenize import PRE_TOKENIZERS
from squall.loaders.tokenizers.spm import SpmTokenizer
from squall.loaders.tokenizers.vocab import Fields, read_vocab

_MODELS = ("llama", "gpt2", "gemma4")


def gguf_tokenizer(metadata: Mapping[str, Any], path: str | Path) -> Tokenizer:
    """Build the tokenizer of ``tokenizer.ggml.*``; the ids equal llama.cpp's.

    ``metadata`` holds the file's key-value pairs (arrays as lists or NumPy arrays), ``path`` is
    for messages. Raises ModelLoadError, one line naming the file and the key.
    """
    fields = Fields(metadata, path)
    model = fields.string("model")
    if model is None:
        raise fields.error("model", "missing: the file holds no tokenizer")
    if model == "llama":
        return _spm(fields)
    if model in _MODELS:
        return _bpe(fields, model)
    raise fields.error(
        "model", f"unsupported tokenizer {model!r} (supported: {', '.join(_MODELS)})"
    )


def _spm(fields: Fields) -> Tokenizer:
    vocab = read_vocab(fields, spm=True)
    add_bos, add_eos = fields.flag("add_bos_token", True), fields.flag("add_eos_token", False)
    _need(fields, "bos", vocab.bos_id, add_bos)
    _need(fields, "eos", vocab.eos_id, add_eos)
    prefix = fields.flag("add_space_prefix", True)
    return SpmTokenizer(vocab, add_bos=add_bos, add_eos=add_eos, space_prefix=prefix)


def _bpe(fields: Fields, model: str) -> Tokenizer:
    name = "gemma4" if model == "gemma4" else fields.string("pre") or "default"
    pre = PRE_TOKENIZERS.get(name)
    if pre is None:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise fields.error("pre", f"unknown pre-tokenizer {name!r} (known: {known})")
    vocab = read_vocab(fields, spm=False)
    merges = fields.array("merges", str, "strings")
    if not (merges is None and pre.split.han):  # Kimi K2's files have none: every word is a token
        merges = fields.required("merges", merges)
    add_bos = fields.flag("add_bos_token", pre.add_bos) or pre.gemma
    add_eos = fields.flag("add_eos_token", False)
    _need(fields, "bos", vocab.bos_id, add_bos)
    _need(fields, "eos", vocab.eos_id, add_eos)
    return BpeTokenizer(vocab, merges or (), pre, add_bos=add_bos, add_eos=add_eos)


def _need(fields: Fields, kind: str, token_id: int | None, wanted: bool) -> None:
    if wanted and token_id is None:
        raise fields.error(f"{kind}_token_id", f"missing, but {kind.upper()} is to be added")
