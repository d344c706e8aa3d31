"""Model folders: tokenizer.json with its companions, and SentencePiece's tokenizer.model."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from squall.loaders.errors import ModelLoadError
from squall.loaders.tokenizers.hf import hf_tokenizer

DATA = Path(__file__).parent / "data"
TEXTS: list[str] = json.loads((DATA / "tokenizer_texts.json").read_bytes())


def write(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(json.dumps(value), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A byte-level tokenizer.json that puts <bos> before every text."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=alphabet,
        special_tokens=["<bos>", "<eos>", "<|im_end|>"],
        show_progress=False,
    )
    made.train_from_iterator(TEXTS, trainer)
    made.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 0)])
    made.save(str(tmp_path / "tokenizer.json"))
    write(
        tmp_path,
        "tokenizer_config.json",
        {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}, "unk_token": None},
    )
    return tmp_path


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "tokenizer_config.json"
    write(folder, path.name, json.loads(path.read_bytes()) | changes)


def test_the_same_ids_as_the_library(folder: Path) -> None:
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer = hf_tokenizer(folder)
    for text in TEXTS:
        assert tokenizer.encode(text) == library.encode(text).ids
        plain = library.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, add_special=False) == plain
        assert tokenizer.decode(plain) == library.decode(plain, skip_special_tokens=True)


def test_special_tokens(folder: Path) -> None:
    tokenizer = hf_tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, None)
    assert tokenizer.eos_ids == {1, 2}
    assert tokenizer.special_ids == {0, 1, 2}
    assert tokenizer.vocab_size == 400
    assert tokenizer.encode("a<|im_end|>")[-1] == 2
    unparsed = tokenizer.encode("a<|im_end|>", parse_special=False)
    assert not {1, 2} & set(unparsed)
    assert tokenizer.decode(unparsed) == "a<|im_end|>"
    assert tokenizer.decode([0, 2]) == ""
    assert tokenizer.decode([0, 2, -1, 10**6], skip_special=False) == "<bos><|im_end|>"
    assert tokenizer.token_text(2) == "<|im_end|>"
    assert tokenizer.token_bytes(2) == b""
    assert tokenizer.token_id("<|im_end|>") == 2
    assert tokenizer.token_id("no such token") is None


@pytest.mark.parametrize(
    ("flags", "before", "after"),
    [
        ({}, [0], []),
        ({"add_bos_token": False}, [], []),
        ({"add_bos_token": True, "add_eos_token": True}, [0], [1]),
        ({"add_eos_token": True}, [0], [1]),
        ({"add_bos_token": None}, [0], []),
    ],
)
def test_the_config_decides_on_bos_and_eos(
    folder: Path, flags: dict[str, bool], before: list[int], after: list[int]
) -> None:
    configure(folder, **flags)
    tokenizer = hf_tokenizer(folder)
    middle = tokenizer.encode("text", add_special=False)
    assert tokenizer.encode("text") == [*before, *middle, *after]


def test_added_tokens_of_the_config(folder: Path) -> None:
    configure(
        folder,
        added_tokens_decoder={
            "400": {"content": "<tool>", "special": False},
            "401": {"content": "<end_of_turn>", "special": True},
        },
    )
    tokenizer = hf_tokenizer(folder)
    assert tokenizer.encode("a<tool><end_of_turn>")[-2:] == [400, 401]
    assert tokenizer.decode([400, 401]) == "<tool>"
    assert 401 in tokenizer.eos_ids
    assert tokenizer.vocab_size == 402


def test_names_from_special_tokens_map(folder: Path) -> None:
    write(folder, "tokenizer_config.json", {})
    write(folder, "special_tokens_map.json", {"eos_token": {"content": "<eos>"}})
    assert hf_tokenizer(folder).eos_id == 1


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"bos_token": 3}, "tokenizer_config.json: bos_token: expected a token, found int"),
        ({"add_bos_token": "yes"}, "add_bos_token: expected true or false, found 'yes'"),
        ({"add_bos_token": True, "bos_token": "<no>"}, "bos_token names no known token"),
        ({"added_tokens_decoder": []}, "added_tokens_decoder: expected an object, found list"),
        ({"added_tokens_decoder": {"x": "y"}}, "added_tokens_decoder: entry 'x'"),
        ({"added_tokens_decoder": {"500": "<new>"}}, "'<new>' has the id 400, but 500"),
    ],
)
def test_bad_configs(folder: Path, changes: dict[str, Any], problem: str) -> None:
    configure(folder, **changes)
    with pytest.raises(ModelLoadError) as caught:
        hf_tokenizer(folder)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff", b'{"version": "1.0"}'])
def test_damaged_tokenizer_json(folder: Path, content: bytes) -> None:
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json: not a usable tokenizer"):
        hf_tokenizer(folder)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"[" * 100_000])
def test_damaged_tokenizer_config(folder: Path, content: bytes) -> None:
    (folder / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"tokenizer_config\.json: (not valid|expected)"):
        hf_tokenizer(folder)


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"tokenizer missing: neither tokenizer\.json nor"):
        hf_tokenizer(tmp_path)


def sentencepiece_model(folder: Path, **options: Any) -> Any:
    import sentencepiece

    stream = io.BytesIO()
    settings = {
        "model_type": "bpe",
        "vocab_size": 600,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "character_coverage": 0.98,
        "user_defined_symbols": ["<tool>"],
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    lines = [line for text in TEXTS[:25] for line in text.replace("\0", "").splitlines() if line]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=stream, **(settings | options)
    )
    (folder / "tokenizer.model").write_bytes(stream.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=stream.getvalue())


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_models(tmp_path: Path, prefix: bool) -> None:
    """The ids of the sentencepiece library, but for spelled-out special tokens."""
    library = sentencepiece_model(tmp_path, add_dummy_prefix=prefix)
    tokenizer = hf_tokenizer(tmp_path)
    assert tokenizer.vocab_size == library.vocab_size()
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (1, 2, 0)
    checked = 0
    for text in TEXTS:
        if "<tool>" in text or "\0" in text or not text:
            continue
        ids = tokenizer.encode(text, add_special=False, parse_special=False)
        assert ids == library.encode(text), text
        assert tokenizer.decode(ids) == text.replace("\u2581", " ")
        checked += 1
    assert checked > 100
    assert tokenizer.encode("a")[0] == 1
    assert tokenizer.decode(tokenizer.encode("x<tool>")).endswith("<tool>")


def test_sentencepiece_with_added_tokens(tmp_path: Path) -> None:
    size = sentencepiece_model(tmp_path).vocab_size()
    write(
        tmp_path,
        "tokenizer_config.json",
        {
            "eos_token": "<|im_end|>",
            "add_bos_token": False,
            "added_tokens_decoder": {
                "2": {"content": "</s>", "special": True},
                str(size): {"content": "<|im_end|>", "special": True},
            },
        },
    )
    tokenizer = hf_tokenizer(tmp_path)
    assert tokenizer.eos_id == size
    assert tokenizer.encode("<|im_end|>") == [size]


def test_sentencepiece_refusals(tmp_path: Path) -> None:
    sentencepiece_model(tmp_path, model_type="unigram")
    with pytest.raises(ModelLoadError, match="type 'unigram' is not supported"):
        hf_tokenizer(tmp_path)
    sentencepiece_model(tmp_path, normalization_rule_name="nmt_nfkc")
    with pytest.raises(ModelLoadError, match="normalize text"):
        hf_tokenizer(tmp_path)


def test_damaged_sentencepiece_models(tmp_path: Path) -> None:
    """Every truncation is refused in one line, or is a shorter well-formed model."""
    sentencepiece_model(tmp_path)
    path = tmp_path / "tokenizer.model"
    whole = path.read_bytes()
    refused = 0
    for length in [*range(0, 200), *range(200, len(whole), 97)]:
        path.write_bytes(whole[:length])
        problem = load_problem(tmp_path)
        assert problem is None or problem.startswith(f"{path}: ")
        assert "\n" not in (problem or "")
        refused += problem is not None
    assert refused > 150


def load_problem(folder: Path) -> str | None:
    try:
        hf_tokenizer(folder)
    except ModelLoadError as error:
        return str(error)
    return None


def test_gap_in_added_tokens(tmp_path: Path) -> None:
    size = sentencepiece_model(tmp_path).vocab_size()
    write(tmp_path, "added_tokens.json", {"<x>": size + 5})
    with pytest.raises(ModelLoadError, match=f"'<x>' leaves a gap after {size} tokens"):
        hf_tokenizer(tmp_path)
