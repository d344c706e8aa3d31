"""GGUF metadata and names in the terms of Hugging Face configs and checkpoints."""

import math
import random
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from squall.loaders.errors import ModelLoadError
from squall.loaders.gguf import GGUFFile
from squall.loaders.gguf_architectures import ARCHITECTURES
from squall.loaders.gguf_config import gguf_config
from squall.loaders.gguf_names import NAME_MAPS, unpermute_rows
from squall.loaders.hf_config import ConfigReader
from squall.models.config import MLAConfig
from squall.models.registry import read_config
from squall.models.rope import rope_table

BASE: dict[str, Any] = {
    "context_length": 512,
    "embedding_length": 64,
    "block_count": 12,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "attention.layer_norm_epsilon": 1e-5,
    "logit_scale": 0.25,
}
ROPE_FACTORS = [1.0, 1.5, 2.0, 4.0, 8.0, 8.0, 8.0, 8.0]


def model(
    folder: Path, architecture: str, keys: dict[str, Any], tensors: dict[str, Any] | None = None
) -> GGUFFile:
    """A file with ``architecture.`` before every key (None: left out) and the tensors given."""
    path = folder / "m.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    for suffix, value in (BASE | keys).items():
        name = f"{architecture}.{suffix}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value) if 0 <= value < 2**32 else writer.add_int64(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif value is not None:
            writer.add_array(name, value)
    writer.add_array("tokenizer.ggml.tokens", [f"t{i}" for i in range(50)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    weights = {"token_embd.weight": np.zeros((50, 64), np.float32)} | (tensors or {})
    for name, array in weights.items():
        writer.add_tensor(name, np.asarray(array, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFFile.open(path)


def test_llama_config(tmp_path: Path) -> None:
    assert gguf_config(model(tmp_path, "llama", {})) == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": 50,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 12,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rms_norm_eps": np.float32(1e-6),
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"attention.head_count_kv": None}, {"num_key_value_heads": 4}),
        ({"attention.head_count_kv": [2] * 12}, {"num_key_value_heads": 2}),
        (
            {"attention.key_length": 32, "attention.value_length": 32, "rope.dimension_count": 32},
            {"head_dim": 32},
        ),
        ({"rope.freq_base": 500000.0}, {"rope_theta": 500000.0}),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {"rope_scaling": None}),
        ({"rope.scaling.type": "linear"}, {"rope_scaling": None}),
        (
            {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
            {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        ),
        ({"rope.scale_linear": 2.0}, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 128,
            },
            {
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 128,
                    "beta_fast": 32.0,
                    "beta_slow": 1.0,
                    "attention_factor": 1.0 + 0.1 * math.log(4.0),
                }
            },
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_optional_keys(
    tmp_path: Path, architecture: str, keys: dict[str, Any], expected: dict[str, Any]
) -> None:
    config = gguf_config(model(tmp_path, architecture, keys))
    assert {name: config[name] for name in expected} == expected


def test_settings_that_tensors_tell(tmp_path: Path) -> None:
    tensors = {
        "output.weight": np.zeros((50, 64)),
        "blk.0.attn_q.bias": np.zeros(64),
        "blk.0.ffn_up.bias": np.zeros(96),
        "rope_freqs.weight": np.array(ROPE_FACTORS),
    }
    config = gguf_config(model(tmp_path, "llama", {}, tensors))
    assert config["tie_word_embeddings"] is False
    assert config["attention_bias"] is True
    assert config["mlp_bias"] is True
    assert config["rope_scaling"] == {
        "rope_type": "factors", "factors": ROPE_FACTORS, "tensor": "rope_freqs.weight",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "sliding", "window"),
    [
        ({"attention.sliding_window": 64}, [i not in (5, 11) for i in range(12)], 64),
        ({"attention.sliding_window": 64, "attention.sliding_window_pattern": 4},
         [i not in (3, 7, 11) for i in range(12)], 64),
        ({"attention.sliding_window": 64, "attention.sliding_window_pattern": [True, False] * 6},
         [True, False] * 6, 64),
        ({"attention.sliding_window": 0}, [False] * 12, None),
        ({}, [False] * 12, None),
    ],
    ids=["default", "period", "flags", "zero", "absent"],
)  # fmt: skip
def test_gemma3_layers(
    tmp_path: Path, keys: dict[str, Any], sliding: list[bool], window: int | None
) -> None:
    config = gguf_config(model(tmp_path, "gemma3", keys | {"rope.freq_base": 1e6}))
    kinds = ["sliding_attention" if s else "full_attention" for s in sliding]
    assert config["layer_types"] == kinds
    assert config["sliding_window"] == window
    assert (config["rope_theta"], config["rope_local_base_freq"]) == (1e6, 10000.0)
    assert config["architectures"] == ["Gemma3ForCausalLM"]
    assert config["hidden_activation"] == "gelu_pytorch_tanh"


def test_gemma3_attention_scale(tmp_path: Path) -> None:
    keys = {"attention.key_length": 32, "attention.value_length": 32}
    assert gguf_config(model(tmp_path, "gemma3", keys))["query_pre_attn_scalar"] == 32
    largest = keys | {"block_count": 62}
    assert gguf_config(model(tmp_path, "gemma3", largest))["query_pre_attn_scalar"] == 64 // 4


_FULL_EVERY = {
    "cohere2": 4,
    "exaone4": 4,
    "gemma2": 2,
    "gemma3": 6,
    "gemma3n": 5,
    "gpt-oss": 2,
    "olmo2": 4,
    "phi3": 13,
    "phimoe": 13,
    "starcoder2": 13,
}


_EXPERTS = {"expert_count": 8, "expert_used_count": 2}


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a != "deepseek2"])
def test_configs_are_read_by_the_models(tmp_path: Path, architecture: str) -> None:
    keys: dict[str, Any] = {"attention.sliding_window": 64}
    if ARCHITECTURES[architecture].experts:
        keys |= _EXPERTS | {"expert_feed_forward_length": 96}
    file = model(tmp_path, architecture, keys)
    config = gguf_config(file)
    decoder = read_config(config["architectures"][0], ConfigReader(config, file.path))
    assert (decoder.num_layers, decoder.num_heads, decoder.num_kv_heads) == (12, 4, 2)
    experts = decoder.moe and (decoder.moe.experts, decoder.moe.router.top_k)
    assert experts == ((8, 2) if ARCHITECTURES[architecture].experts else None)
    assert (decoder.head_dim, decoder.vocab_size, decoder.tie_embeddings) == (16, 50, True)
    assert decoder.attention_scale == pytest.approx(1 if architecture == "gemma3n" else 16**-0.5)
    full = _FULL_EVERY.get(architecture, 1)  # each n-th layer sees all
    windows = [layer.window for layer in decoder.layers]
    assert windows == [0 if (i + 1) % full == 0 else 64 for i in range(12)]


_OLD = {
    "attention.kv_lora_rank": 24,
    "attention.key_length": 12,
    "attention.value_length": 10,
    "rope.dimension_count": 4,
    "attention.head_count_kv": 4,
}
_NEW = _OLD | {
    "attention.key_length": 28,
    "attention.value_length": 24,
    "attention.key_length_mla": 12,
    "attention.value_length_mla": 10,
    "attention.head_count_kv": 1,
}
_YARN = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 40.0,
    "rope.scaling.yarn_log_multiplier": 0.0707,
}


@pytest.mark.parametrize("keys", [_OLD, _NEW], ids=["old", "new"])
def test_latent_attention(tmp_path: Path, keys: dict[str, Any]) -> None:
    config = gguf_config(model(tmp_path, "deepseek2", keys))
    decoder = read_config(config["architectures"][0], ConfigReader(config, tmp_path))
    assert decoder.mla == MLAConfig(None, 24, 8, 4, 10)
    assert (decoder.num_layers, decoder.num_heads, decoder.head_dim) == (12, 4, 12)
    assert decoder.kv_shape == (1, 28, 0)
    assert decoder.attention_scale == pytest.approx(12**-0.5)
    queries = gguf_config(model(tmp_path, "deepseek2", keys | {"attention.q_lora_rank": 20}))
    assert queries["q_lora_rank"] == 20


def test_latent_attention_of_longer_contexts(tmp_path: Path) -> None:
    """The file has a tenth of the weight; rope itself is not scaled, scores are."""
    config = gguf_config(model(tmp_path, "deepseek2", _NEW | _YARN))
    decoder = read_config(config["architectures"][0], ConfigReader(config, tmp_path))
    factor = 0.0707 * math.log(40) + 1
    assert decoder.attention_scale == pytest.approx(12**-0.5 * factor**2)
    assert rope_table(decoder.ropes[0], 8, torch.device("cpu"))[0, 0] == 1.0


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "architecture": ("lama", {}, r"'lama' is not supported; nearest: llama; supported: llama, q"),
    "missing": ("llama", {"block_count": None}, r"'llama\.block_count' is missing"),
    "type": ("llama", {"block_count": "12"}, r"'llama\.block_count' is str"),
    "float": ("llama", {"embedding_length": 64.0}, r"'llama\.embedding_length' is float"),
    "zero": ("qwen2", {"attention.head_count": 0}, r"0 is not in \[1, "),
    "layers": ("qwen3", {"block_count": 513}, "513 layers; at most 512"),
    "too large": ("llama", {"context_length": 2**31}, r"2147483648 is not in"),
    "kv heads": ("llama", {"attention.head_count_kv": 3}, "3 does not divide 4"),
    "per layer": ("llama", {"attention.head_count_kv": [1, 2]}, "differs from layer to layer"),
    "flags for counts": (
        "llama",
        {"attention.head_count_kv": [True] * 12},
        "differs from layer to layer",
    ),
    "value size": ("llama", {"attention.value_length": 8}, "8 is not the head size 16"),
    "rope size": ("llama", {"rope.dimension_count": 8}, "8 is not the head size 16"),
    "experts": ("qwen2", {"expert_count": 8}, "experts are not supported in qwen2"),
    "no experts": ("qwen3moe", {"expert_count": 0}, r"0 is not in \[1, "),
    "used experts": ("llama", _EXPERTS | {"expert_used_count": 9}, "9 of 8 experts"),
    "groups": (
        "deepseek2",
        _NEW | _EXPERTS | {"expert_group_count": 2, "expert_group_used_count": 3},
        "3 of 2 groups",
    ),
    "gating": (
        "deepseek2",
        _NEW | _EXPERTS | {"expert_gating_func": 3, "expert_feed_forward_length": 32},
        "3 is not 1 .softmax. or 2",
    ),
    "temperature": (
        "deepseek2",
        _NEW | {"attention.temperature_scale": 0.1},
        "temperature_scale': is not supported",
    ),
    "softmax": ("glm4moe", _EXPERTS | {"expert_gating_func": 1}, r"1 is not 2 .sigmoid"),
    "two sizes": (
        "hunyuan-moe",
        _EXPERTS | {"expert_feed_forward_length": 32},
        "32 is not feed_forward_length, 96",
    ),
    "further layers": ("llama", {"nextn_predict_layers": 12}, "12 of 12 layers"),
    "epsilon": ("llama", {"attention.layer_norm_rms_epsilon": 0.0}, "not a number above 0"),
    "epsilon nan": ("llama", {"attention.layer_norm_rms_epsilon": math.nan}, "nan is not a num"),
    "theta": ("llama", {"rope.freq_base": -1.0}, r"rope\.freq_base'.*-1\.0"),
    "factor": ("llama", {"rope.scaling.factor": math.inf}, "inf is not a number"),
    "scaling": ("qwen2", {"rope.scaling.type": "longrope"}, "'longrope' is not one of none, lin"),
    "yarn": (
        "qwen2",
        {"rope.scaling.type": "yarn", "rope.scaling.yarn_ext_factor": 0.5},
        "only 1 is supported",
    ),
    "rotated part": ("deepseek2", _NEW | {"rope.dimension_count": 12}, "12 is not below the head"),
    "scores": (
        "deepseek2",
        _NEW | _YARN | {"rope.scaling.attn_factor": 2.0},
        r"attn_factor': only 1 is supported",
    ),
    "pattern": (
        "gemma3",
        {"attention.sliding_window": 8, "attention.sliding_window_pattern": [True]},
        "1 flags for 12 layers",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_metadata(tmp_path: Path, name: str) -> None:
    architecture, keys, message = BAD[name]
    file = model(tmp_path, architecture, keys)
    with pytest.raises(ModelLoadError, match=message) as caught:
        gguf_config(file)
    assert str(caught.value).startswith(str(file.path))
    assert "\n" not in str(caught.value)


def test_bad_tensors(tmp_path: Path) -> None:
    small = {"token_embd.weight": np.zeros((49, 64))}
    with pytest.raises(ModelLoadError, match=r"shape \[49, 64\], the vocabulary 50"):
        gguf_config(model(tmp_path, "llama", {}, small))
    factors = {"rope_freqs.weight": np.array([1.0, 0.0] * 4)}
    with pytest.raises(ModelLoadError, match=r"'rope_freqs\.weight' has values"):
        gguf_config(model(tmp_path, "llama", {}, factors))
    factors = {"rope_freqs.weight": np.ones(3)}
    with pytest.raises(ModelLoadError, match=r"'rope_freqs\.weight' has 3 .*8"):
        gguf_config(model(tmp_path, "llama", {}, factors))
    factors = {"rope_freqs.weight": np.ones(8)}
    with pytest.raises(ModelLoadError, match="together with tensor"):
        gguf_config(model(tmp_path, "llama", {"rope.scaling.factor": 2.0}, factors))


def test_any_metadata_is_a_config_or_an_error(tmp_path: Path) -> None:
    """Values of every type and size under every key a config is made from."""
    source = random.Random(5)
    keys = [*BASE, "attention.key_length", "rope.freq_base", "rope.scaling.type", "expert_count",
            "rope.scaling.factor", "rope.dimension_count", "attention.sliding_window",
            "attention.sliding_window_pattern", "final_logit_softcapping"]  # fmt: skip
    values = [0, 1, -1, 2**31, 2**62, 0.0, -1.5, math.nan, math.inf, "yarn", "", True, [1, 2],
              [4] * 12, [0.5], ["x"], [True] * 12, None]  # fmt: skip
    errors = 0
    for _ in range(300):
        change = {source.choice(keys): source.choice(values) for _ in range(source.randint(1, 2))}
        file = model(tmp_path, source.choice(list(ARCHITECTURES)), change)
        try:
            assert gguf_config(file)["hidden_size"] > 0
        except ModelLoadError:
            errors += 1
    assert 50 < errors < 300


@pytest.mark.parametrize("architecture", NAME_MAPS)
def test_names_are_those_of_the_gguf_package(architecture: str) -> None:
    """Every parameter maps as gguf's own tensor map says, and back."""
    kind = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture)
    official = gguf.get_tensor_name_map(kind, 12)
    names = NAME_MAPS[architecture]
    parameters = [f"{module}.weight" for module in names.outer]
    parameters += [f"model.layers.11.{m}.{k}" for m in names.block for k in ("weight", "bias")]
    for parameter in parameters:
        tensor = names.gguf_name(parameter)
        assert tensor == official.get_name(parameter, try_suffixes=(".weight", ".bias"))
        assert names.parameter_name(tensor) == parameter


def test_names_of_experts() -> None:
    layer = "model.layers.7"
    experts = NAME_MAPS["llama"].expert_tensors(f"{layer}.block_sparse_moe.experts.{{}}.w3.weight")
    assert experts == ("blk.7.ffn_up_exps.weight",)
    both = ("blk.7.ffn_gate_exps.bias", "blk.7.ffn_up_exps.bias")
    assert NAME_MAPS["gpt-oss"].expert_tensors(f"{layer}.mlp.experts.gate_up_proj_bias") == both
    shared = NAME_MAPS["granitemoe"].split_tensors(f"{layer}.shared_mlp.input_linear.weight")
    assert shared == ("blk.7.ffn_gate_shexp.weight", "blk.7.ffn_up_shexp.weight")
    assert NAME_MAPS["granitemoe"].split_tensors(f"{layer}.self_attn.q_proj.weight") == ()
    correction = NAME_MAPS["deepseek2"].gguf_name(f"{layer}.mlp.gate.e_score_correction_bias")
    assert correction == "blk.7.exp_probs_b.bias"


def test_names_outside_the_map() -> None:
    names = NAME_MAPS["llama"]
    assert names.parameter_name("rope_freqs.weight") is None
    assert names.parameter_name("blk.0.attn_q_norm.weight") is None
    assert names.parameter_name("token_embd.scale") is None
    assert "rope_freqs.weight" in names.consumed
    with pytest.raises(KeyError, match="q_norm"):
        names.gguf_name("model.layers.0.self_attn.q_norm.weight")
    assert set(NAME_MAPS) == set(ARCHITECTURES)
    assert NAME_MAPS["gemma3"].norm_shift == 1.0


def test_permuted_heads() -> None:
    config = {"num_attention_heads": 9, "num_key_value_heads": 3}
    layer = "model.layers.4.self_attn"
    heads = {
        name: NAME_MAPS["llama"].permuted_heads(f"{layer}.{name}", config)
        for name in ("q_proj.weight", "q_proj.bias", "k_proj.weight", "v_proj.weight")
    }
    assert heads == {"q_proj.weight": 9, "q_proj.bias": 9, "k_proj.weight": 3, "v_proj.weight": 0}
    assert NAME_MAPS["llama"].permuted_heads("lm_head.weight", config) == 0
    assert NAME_MAPS["qwen2"].permuted_heads(f"{layer}.q_proj.weight", config) == 0


@pytest.mark.parametrize(("heads", "size"), [(1, 2), (3, 8), (4, 64)])
@pytest.mark.parametrize("tail", [(), (5,)], ids=["bias", "weight"])
def test_unpermute_rows(heads: int, size: int, tail: tuple[int, ...]) -> None:
    """Row ``2 i + half`` of a head in the file is row ``half * D/2 + i`` of the checkpoint."""
    original = torch.arange(heads * size * math.prod(tail)).view(heads * size, *tail)
    stored = torch.empty_like(original)
    for head in range(heads):
        for i in range(size // 2):
            for half in range(2):
                stored[head * size + 2 * i + half] = original[head * size + half * size // 2 + i]
    assert torch.equal(unpermute_rows(stored, heads), original)


def test_unpermute_rows_of_quantised_bytes() -> None:
    kind = gguf.GGMLQuantizationType.Q8_0
    weights = np.random.default_rng(0).standard_normal((16, 64), dtype=np.float32)
    packed = torch.from_numpy(gguf.quants.quantize(weights, kind))
    unpermuted = gguf.quants.dequantize(unpermute_rows(packed, 2).numpy(), kind)
    dequantised = torch.from_numpy(gguf.quants.dequantize(packed.numpy(), kind))
    assert torch.equal(torch.from_numpy(unpermuted), unpermute_rows(dequantised, 2))
