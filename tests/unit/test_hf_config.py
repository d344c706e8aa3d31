"""Typed config reads, EOS ids and the rope settings' dialects."""

import json
from pathlib import Path
from typing import Any

import pytest

from squall.loaders.errors import ModelLoadError
from squall.loaders.hf_config import (
    ConfigReader,
    checkpoint_dtype,
    eos_ids,
    find_architecture,
    read_json,
    rope_parameters,
)


def reader(**data: Any) -> ConfigReader:
    return ConfigReader(data, "config.json")


def test_required_and_default_reads() -> None:
    config = reader(a=3, f=1, b=True, s="x", li=[1], d={"k": 1}, n=None)
    assert config.get_int("a") == 3
    assert config.get_float("f") == 1.0
    assert isinstance(config.get_float("f"), float)
    assert config.get_bool("b") is True
    assert config.get_str("s") == "x"
    assert config.get_list("li", item=int) == [1]
    assert config.get_dict("d") == {"k": 1}
    assert config.get_int("n", 7) == 7
    assert config.get_int("absent", None) is None
    assert config.get_int("absent", aliases=("a",)) == 3
    assert config.has("a")
    assert not config.has("n")
    assert reader(x=1, y=2).unread() == ["x", "y"]


def test_integral_float_is_an_integer() -> None:
    value = reader(a=2048.0).get_int("a")
    assert value == 2048
    assert isinstance(value, int)


@pytest.mark.parametrize(
    ("method", "value", "message"),
    [
        ("get_int", "3", "expected an integer, found '3'"),
        ("get_int", True, "expected an integer, found True"),
        ("get_int", 1.5, "expected an integer, found 1.5"),
        ("get_int", 2**70, "expected a 64-bit integer"),
        ("get_float", "x", "expected a number"),
        ("get_float", float("nan"), "expected a finite number"),
        ("get_float", float("inf"), "expected a finite number"),
        ("get_float", 10**400, "expected a finite number"),
        ("get_bool", 1, "expected true or false"),
        ("get_str", 1, "expected a string"),
        ("get_list", {}, "expected a list, found an object"),
        ("get_dict", [1], "expected an object, found a list of 1"),
    ],
)
def test_wrong_value_names_key_file_and_finding(method: str, value: object, message: str) -> None:
    with pytest.raises(ModelLoadError) as caught:
        getattr(reader(key=value), method)("key")
    text = str(caught.value)
    assert text.startswith("config.json: key: ")
    assert message in text
    assert "\n" not in text


def test_missing_required_key_names_aliases_and_nesting() -> None:
    with pytest.raises(ModelLoadError, match=r"^config\.json: a: missing, and needed \(or b\)$"):
        reader().get_int("a", aliases=("b",))
    with pytest.raises(ModelLoadError, match=r"^config\.json: text_config\.a: missing"):
        reader(text_config={}).sub("text_config").get_int("a")


@pytest.mark.parametrize("value", [0, -1])
def test_sizes_are_positive(value: int) -> None:
    with pytest.raises(ModelLoadError, match=r"hidden_size: expected an integer >= 1"):
        reader(hidden_size=value).get_int("hidden_size")
    assert reader(pad_token_id=value).get_int("pad_token_id") == value


def test_bounds_choices_and_items() -> None:
    with pytest.raises(ModelLoadError, match="expected an integer from 1 to 4"):
        reader(a=5).get_int("a", minimum=1, maximum=4)
    with pytest.raises(ModelLoadError, match="expected a number > 0, found 0"):
        reader(a=0).get_float("a", above=0)
    with pytest.raises(ModelLoadError, match="found 'relu', accepted: silu, gelu"):
        reader(a="relu").get_str("a", choices=("silu", "gelu"))
    with pytest.raises(ModelLoadError, match=r"a\[1\]: expected int, found True"):
        reader(a=[1, True]).get_list("a", item=int)
    with pytest.raises(ModelLoadError, match="expected 2 entries, found 1"):
        reader(a=[1]).get_list("a", length=2)
    assert reader(a=[1, 2.5]).get_list("a", item=float) == [1, 2.5]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "not UTF-8"),
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"[1]", "expected a JSON object, found a list of 1"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b" " * 2000, "larger than"),
    ],
)
def test_bad_json(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    limit = 1000 if message == "larger than" else 1 << 20
    with pytest.raises(ModelLoadError, match=message) as caught:
        read_json(path, limit=limit)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="no such file"):
        read_json(tmp_path / "config.json")
    with pytest.raises(ModelLoadError, match="cannot be read"):
        read_json(tmp_path)


def test_architecture_is_the_single_entry() -> None:
    assert find_architecture(reader(architectures=["LlamaForCausalLM"])) == "LlamaForCausalLM"
    multimodal = reader(architectures=["Gemma3ForConditionalGeneration"], text_config={})
    assert find_architecture(multimodal) == "Gemma3ForConditionalGeneration"
    for bad in ([], ["A", "B"], [1], "LlamaForCausalLM", None):
        with pytest.raises(ModelLoadError, match="architectures"):
            find_architecture(reader(architectures=bad))


def test_a_nested_config_leaves_out_what_its_class_defaults_to() -> None:
    """As in the published Gemma 3 files with a vision part."""
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "num_attention_heads": 32}
    nested = reader(text_config=text).sub("text_config")
    assert nested.get_int("vocab_size") == 262208
    assert nested.get_int("head_dim") == 256
    assert nested.get_int("num_attention_heads") == 32
    with pytest.raises(ModelLoadError, match=r"text_config\.vocab_size: missing"):
        reader(text_config={"model_type": "mistral"}).sub("text_config").get_int("vocab_size")


def test_one_integer_for_all_or_each() -> None:
    sizes = reader(one=7, each=[3, 4], bad=[3, "4"])
    assert sizes.get_each("one", 2) == [7, 7]
    assert sizes.get_each("each", 2) == [3, 4]
    with pytest.raises(ModelLoadError, match="each: expected 3 entries, found 2"):
        sizes.get_each("each", 3)
    with pytest.raises(ModelLoadError, match=r"bad\[1\]: expected int"):
        sizes.get_each("bad", 2)


def test_checkpoint_dtype() -> None:
    assert checkpoint_dtype(reader(torch_dtype="bfloat16")) == "bfloat16"
    assert checkpoint_dtype(reader(dtype="torch.float16")) == "float16"
    assert checkpoint_dtype(reader(text_config={"dtype": "float32"})) == "float32"
    assert checkpoint_dtype(reader()) is None
    with pytest.raises(ModelLoadError, match="accepted: float32, float16, bfloat16"):
        checkpoint_dtype(reader(dtype="int4"))


def test_eos_ids_are_the_union(tmp_path: Path) -> None:
    assert eos_ids(tmp_path) == set()
    config = {"eos_token_id": 2, "text_config": {"eos_token_id": [3, 4]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert eos_ids(tmp_path) == {2, 3, 4, 7}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": "x"}))
    with pytest.raises(ModelLoadError, match=r"generation_config\.json: eos_token_id"):
        eos_ids(tmp_path)


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("config", "layer_type", "expected"),
    [
        ({}, None, {"rope_type": "default", "rope_theta": 1e4}),
        ({"rope_theta": 5e5}, None, {"rope_type": "default", "rope_theta": 5e5}),
        ({"rope_scaling": None}, None, {"rope_type": "default", "rope_theta": 1e4}),
        (
            {"rope_theta": 2, "rope_scaling": {"type": "linear", "factor": 4}},
            None,
            {"rope_type": "linear", "rope_theta": 2.0, "factor": 4},
        ),
        (
            {"rope_scaling": {"type": "mrope", "mrope_section": [1, 2]}},
            None,
            {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 2]},
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 3.0}},
            "sliding_attention",
            {"rope_type": "default", "rope_theta": 3.0},
        ),
        (
            {
                "max_position_embeddings": 64,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "type": "x",
                    "original_max_position_embeddings": 32,
                    **LLAMA3,
                },
            },
            None,
            {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "original_max_position_embeddings": 32,
                **LLAMA3,
            },
        ),
        (
            {"max_position_embeddings": 64, "rope_parameters": {"rope_type": "yarn", "factor": 2}},
            None,
            {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 2,
                "original_max_position_embeddings": 64,
            },
        ),
        (
            {"partial_rotary_factor": 0.5},
            None,
            {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        ),
    ],
)
def test_rope_dialects(config: dict[str, Any], layer_type: str | None, expected: object) -> None:
    assert rope_parameters(reader(**config), layer_type) == expected


GEMMA_DIALECTS: list[dict[str, Any]] = [
    {
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"type": "linear", "factor": 8},
    },
    # Published Gemma 3 files leave out what equals the defaults of transformers 4.
    {"model_type": "gemma3_text", "rope_scaling": {"rope_type": "linear", "factor": 8}},
    {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    },
]


@pytest.mark.parametrize("config", GEMMA_DIALECTS)
def test_rope_per_layer_type(config: dict[str, Any]) -> None:
    full = reader(**config).rope("full_attention")
    assert full == {"rope_type": "linear", "factor": 8, "rope_theta": 1e6}
    sliding = reader(**config).rope("sliding_attention")
    assert sliding == {"rope_type": "default", "rope_theta": 1e4}


def test_rope_equals_transformers_for_saved_configs(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    llama = transformers.LlamaConfig(
        rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3},
        max_position_embeddings=8192,
    )
    llama.save_pretrained(tmp_path / "llama")
    ours = ConfigReader.from_file(tmp_path / "llama" / "config.json").rope()
    assert ours == llama.rope_parameters
    gemma = transformers.Gemma3TextConfig()
    gemma.save_pretrained(tmp_path / "gemma")
    config = ConfigReader.from_file(tmp_path / "gemma" / "config.json")
    for kind in ("full_attention", "sliding_attention"):
        assert config.rope(kind) == gemma.rope_parameters[kind]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_theta": 0}, "rope_theta: expected a number > 0"),
        ({"rope_theta": "big"}, "rope_theta: expected a number"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor: missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor: expected a number > 0"),
        ({"rope_scaling": {"type": 3}}, "rope_scaling.type: expected a string"),
        ({"rope_scaling": [1]}, "rope_scaling: expected an object"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "max_position_embeddings: missing"),
        ({"rope_parameters": {"sliding_attention": {}}}, "no full_attention"),
    ],
)
def test_bad_rope(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError) as caught:
        rope_parameters(reader(**config))
    assert message in str(caught.value)
