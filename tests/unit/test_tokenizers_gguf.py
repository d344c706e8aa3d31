"""GGUF tokenizers against ids that llama.cpp (llama-cpp-python 0.3.36) gave for the same files.

``data/tokenizer_texts.json`` holds the texts; golden ids are CRC-32 sums of the decimal ids, two a
text: with BOS/EOS and special tokens parsed, and with neither.
"""

import json
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from squall.loaders.errors import ModelLoadError
from squall.loaders.tokenizer import Tokenizer
from squall.loaders.tokenizers.gguf import gguf_tokenizer
from squall.loaders.tokenizers.pretokenize import PRE_TOKENIZERS
from squall.tools.fixtures import vocab_files

DATA = Path(__file__).parent / "data"


def load(name: str) -> Any:
    return json.loads((DATA / name).read_bytes())


TEXTS: list[str] = load("tokenizer_texts.json")
BPE = load("tokenizer_bpe.json")
SPM = load("tokenizer_spm.json")
VOCABS = load("tokenizer_vocabs.json")


def both_ways(tokenizer: Tokenizer, text: str) -> list[list[int]]:
    return [
        tokenizer.encode(text),
        tokenizer.encode(text, add_special=False, parse_special=False),
    ]


def checksum(ids: list[int]) -> str:
    return f"{zlib.crc32(','.join(map(str, ids)).encode()):08x}"


def wrong_texts(tokenizer: Tokenizer, golden: str) -> list[tuple[str, list[int]]]:
    cases = [(text, ids) for text in TEXTS for ids in both_ways(tokenizer, text)]
    assert len(golden) == 8 * len(cases)
    return [
        (text, ids)
        for i, (text, ids) in enumerate(cases)
        if checksum(ids) != golden[8 * i : 8 * i + 8]
    ]


def bpe(pre: str = "gpt-2", **changes: Any) -> Tokenizer:
    """The small byte-level vocabulary; ``changes`` are values without ``tokenizer.ggml.``."""
    metadata = {**BPE["metadata"], "tokenizer.ggml.pre": pre}
    return gguf_tokenizer(changed(metadata, changes), "x.gguf")


def spm(**changes: Any) -> Tokenizer:
    return gguf_tokenizer(changed(SPM["metadata"], changes), "x.gguf")


def changed(metadata: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    metadata = metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return {key: value for key, value in metadata.items() if value is not None}


def spelled(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.token_text(i) for i in ids]


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_pre_tokenizer_gives_llama_cpp_ids(pre: str) -> None:
    assert wrong_texts(bpe(pre), BPE["ids"][BPE["pre"][pre]]) == []


def test_a_missing_pre_means_default() -> None:
    tokenizer = gguf_tokenizer(BPE["metadata"], "x.gguf")
    assert wrong_texts(tokenizer, BPE["ids"][BPE["pre"][""]]) == []


@pytest.mark.parametrize("variant", SPM["variants"])
def test_spm_gives_llama_cpp_ids(variant: str) -> None:
    golden = SPM["variants"][variant]
    tokenizer = gguf_tokenizer(SPM["metadata"] | golden["metadata"], "x.gguf")
    assert wrong_texts(tokenizer, golden["ids"]) == []
    assert sorted(tokenizer.eos_ids) == golden["end"]


def test_spm_ids_in_full() -> None:
    tokenizer = spm()
    found = [ids for text in TEXTS[: len(SPM["full"]) // 2] for ids in both_ways(tokenizer, text)]
    assert found == SPM["full"]


@pytest.mark.parametrize("name", VOCABS)
def test_real_vocabularies(name: str) -> None:
    """llama.cpp's vocabulary files: its own texts (.inp/.out where there are some), and ours."""
    from squall.loaders.gguf import GGUFFile

    path = vocab_files() / f"ggml-vocab-{name}.gguf"
    tokenizer = gguf_tokenizer(GGUFFile.open(path).metadata, path)
    golden = VOCABS[name]
    assert wrong_texts(tokenizer, golden["ids"]) == []
    assert sorted(tokenizer.eos_ids) == golden["end"]
    assert (tokenizer.bos_id, tokenizer.eos_id) == (golden["bos"], golden["eos"])
    texts = path.with_name(path.name + ".inp")
    if name in ("aquila", "baichuan", "gpt-neox"):
        assert not texts.exists()
        return
    separator = b"\n__ggml_vocab_test__\n"
    given = [part.decode() for part in texts.read_bytes().split(separator)]
    expected = path.with_name(path.name + ".out").read_text().splitlines()
    assert len(expected) >= 46
    for text, line in zip(given, expected, strict=False):
        ids = tokenizer.encode(text, add_special=False, parse_special=False)
        assert ids == [int(i) for i in line.split()], text


def test_arrays_may_be_numpy() -> None:
    types = np.array(BPE["metadata"]["tokenizer.ggml.token_type"], dtype=np.int32)
    assert bpe(token_type=types).encode("<|im_end|>") == bpe().encode("<|im_end|>")
    scores = np.array(SPM["metadata"]["tokenizer.ggml.scores"], dtype=np.float32)
    assert spm(scores=scores).encode("Hello world") == spm().encode("Hello world")


@pytest.mark.parametrize(
    ("tokenizer", "changes", "problem"),
    [
        ("spm", {"model": None}, "model: missing"),
        ("spm", {"model": 3}, "model: expected a string, found int"),
        ("spm", {"model": "bert"}, "'bert' (supported: llama, gpt2, gemma4)"),
        ("bpe", {"model": "t5"}, "'t5'"),
        ("bpe", {"model": "rwkv"}, "'rwkv'"),
        ("bpe", {"pre": "new-pre"}, "pre: unknown pre-tokenizer 'new-pre' (known: a.x-4.0, afmoe,"),
        ("bpe", {"tokens": None}, "tokens: missing"),
        ("bpe", {"tokens": []}, "tokens: missing"),
        ("bpe", {"tokens": "abc"}, "tokens: expected an array of strings, found str"),
        ("bpe", {"tokens": ["a", 3]}, "tokens: expected an array of strings, found int in it"),
        ("bpe", {"merges": None}, "merges: missing"),
        ("bpe", {"merges": [1]}, "merges: expected an array of strings"),
        ("spm", {"scores": None}, "scores: missing"),
        ("spm", {"scores": [0.0]}, "scores: 1 entries for"),
        ("spm", {"token_type": [1, 2]}, "token_type: 2 entries for"),
        ("spm", {"token_type": [6] * 859}, "token_type"),
        ("spm", {"bos_token_id": 10**6}, "bos_token_id: token id 1000000 outside"),
        ("spm", {"eot_token_id": -1}, "eot_token_id: token id -1 outside"),
        ("spm", {"eos_token_id": "2"}, "eos_token_id: expected a token id, found '2'"),
        ("bpe", {"add_bos_token": 1}, "add_bos_token: expected true or false, found 1"),
        (
            "bpe",
            {"add_bos_token": True, "bos_token_id": None},
            "bos_token_id: missing, but BOS is to be added",
        ),
    ],
)
def test_bad_metadata_is_one_line(tokenizer: str, changes: dict[str, Any], problem: str) -> None:
    data = SPM if tokenizer == "spm" else BPE
    with pytest.raises(ModelLoadError) as caught:
        gguf_tokenizer(changed(data["metadata"], changes), "dir/x.gguf")
    message = str(caught.value)
    assert message.startswith("dir/x.gguf: tokenizer.ggml.")
    assert problem in message
    assert "\n" not in message


def test_duplicate_tokens_are_refused() -> None:
    tokens = list(SPM["metadata"]["tokenizer.ggml.tokens"])
    tokens[400] = tokens[300]
    with pytest.raises(ModelLoadError, match="tokens 300 and 400 are the same text"):
        spm(tokens=tokens)


def test_a_score_that_is_not_a_number_is_refused() -> None:
    scores = list(SPM["metadata"]["tokenizer.ggml.scores"])
    scores[7] = float("nan")
    with pytest.raises(ModelLoadError, match="score of token 7 is not a number"):
        spm(scores=scores)


def test_empty_tokens_do_not_clash() -> None:
    tokens = list(SPM["metadata"]["tokenizer.ggml.tokens"])
    tokens[400] = tokens[401] = ""
    assert spm(tokens=tokens).token_id("[EMPTY_401]") == 401


def test_ends_by_name_and_by_key() -> None:
    tokenizer = bpe()
    names = {tokenizer.token_text(i) for i in tokenizer.eos_ids}
    assert names == {"<|endoftext|>", "<|im_end|>", "<eos>"}
    user = tokenizer.token_id("<|usr|>")
    assert user in bpe(eot_token_id=user).eos_ids


def test_end_tokens_of_harmony_vocabularies() -> None:
    tokens = list(BPE["metadata"]["tokenizer.ggml.tokens"])
    tokens[300:304] = ["<|end|>", "<|return|>", "<|call|>", "<|channel|>"]
    tokenizer = bpe(tokens=tokens)
    assert {301, 302} <= tokenizer.eos_ids
    assert 300 not in tokenizer.eos_ids
    assert tokenizer.decode([300, 301, 303]) == "<|end|><|channel|>"


def test_special_tokens_are_parsed_only_on_request() -> None:
    tokenizer = bpe()
    end = tokenizer.token_id("<|im_end|>")
    assert end in tokenizer.special_ids
    assert tokenizer.encode("a<|im_end|>b").count(end or -1) == 1
    assert end not in tokenizer.encode("a<|im_end|>b", parse_special=False)
    user = tokenizer.token_id("<|usr|>")
    assert user in tokenizer.encode("a<|usr|>b", parse_special=False)
    assert user not in tokenizer.special_ids


def test_decode_shows_specials_when_asked() -> None:
    tokenizer = bpe()
    ids = tokenizer.encode("a<|im_end|>b<|usr|>")
    assert tokenizer.decode(ids) == "ab<|usr|>"
    assert tokenizer.decode(ids, skip_special=False) == "a<|im_end|>b<|usr|>"
    assert tokenizer.token_bytes(tokenizer.token_id("<|im_end|>") or -1) == b""
    assert spelled(tokenizer, ids)[1] == "<|im_end|>"


def test_ids_outside_the_vocabulary_have_no_text() -> None:
    tokenizer = spm()
    assert tokenizer.decode([-1, tokenizer.vocab_size, 10**9]) == ""
    assert tokenizer.token_text(tokenizer.vocab_size) == ""


def test_special_tokens_of_one_byte_length() -> None:
    """Equal in bytes, not in characters: the lower id goes first, also at the end of the text."""
    tokens = list(BPE["metadata"]["tokenizer.ggml.tokens"])
    types = [1] * len(tokens)
    tokens[300:303], types[300:303] = ["\u2192", "!!!", "<\u2192>"], [4, 4, 4]
    tokenizer = bpe(tokens=tokens, token_type=types)
    assert tokenizer.encode("!!!\u2192") == [301, 300]
    assert tokenizer.encode("<\u2192>\u2192") == [302, 300]
    assert tokenizer.encode("!!!!\u2192") == [301, *tokenizer.encode("!"), 300]


def test_space_prefix_rules() -> None:
    tokenizer = spm()
    hello = tokenizer.encode("Hello", add_special=False)
    assert tokenizer.token_bytes(hello[0]).startswith(b" ")
    assert tokenizer.decode(hello) == "Hello"
    assert tokenizer.decode(tokenizer.encode("  Hello")) == "  Hello"
    after = tokenizer.encode("<|user|>Hello", add_special=False)
    assert after[1:] == hello
    plain = spm(add_space_prefix=False)
    assert not plain.token_bytes(plain.encode("Hello", add_special=False)[0]).startswith(b" ")


def test_bytes_fall_back_to_the_unknown_token() -> None:
    data = SPM["metadata"]
    kept = range(256 + 3, len(data["tokenizer.ggml.tokens"]))
    keys = ("tokens", "scores", "token_type")
    tables = {key: [data[f"tokenizer.ggml.{key}"][i] for i in (0, 1, 2, *kept)] for key in keys}
    assert spm(**tables).encode("\u0bf5", add_special=False)[-3:] == [0, 0, 0]


def test_lone_surrogates_become_replacement_characters() -> None:
    tokenizer = bpe()
    assert tokenizer.encode("a\ud800b") == tokenizer.encode("a\ufffdb")
    assert tokenizer.encode("\ud83d\ude00") == tokenizer.encode("\U0001f600")


def test_text_comes_back_unchanged() -> None:
    tokenizer = bpe()
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special=False, parse_special=False)
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    "piece", ["a", " ", "\n ", "12", "<|", "<|im_end|>", "\u4f60\u597d", "x y "]
)
@pytest.mark.parametrize("make", [bpe, spm], ids=["bpe", "spm"])
def test_long_repetitions_are_not_quadratic(make: Any, piece: str) -> None:
    """50 times the text may take 500 times as long (timer noise, caches), not 2,500 times."""
    tokenizer = make()

    def seconds(text: str) -> float:
        start = time.process_time()
        tokenizer.encode(text)
        return time.process_time() - start

    short = max(min(seconds(piece * (600 // len(piece))) for _ in range(3)), 1e-4)
    assert seconds(piece * (30_000 // len(piece))) < 500 * short
