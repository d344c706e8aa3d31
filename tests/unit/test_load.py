"""``Checkpoint`` on folders that do not hold together: one line each, with what and where."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from squall.loaders.errors import ModelLoadError
from squall.loaders.hub import resolve
from squall.loaders.load import Checkpoint
from squall.loaders.progress import NoProgress
from squall.runtime.memory import OptionError
from squall.runtime.options import EngineOptions
from squall.runtime.startup import build_engine

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
}
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
F8 = torch.float8_e4m3fn


def tensors() -> dict[str, Tensor]:
    shapes = {
        "model.embed_tokens": (11, 8),
        "model.norm": (8,),
        "lm_head": (11, 8),
        "model.layers.0.input_layernorm": (8,),
        "model.layers.0.post_attention_layernorm": (8,),
        "model.layers.0.self_attn.q_proj": (8, 8),
        "model.layers.0.self_attn.k_proj": (4, 8),
        "model.layers.0.self_attn.v_proj": (4, 8),
        "model.layers.0.self_attn.o_proj": (8, 8),
        "model.layers.0.mlp.gate_proj": (12, 8),
        "model.layers.0.mlp.up_proj": (12, 8),
        "model.layers.0.mlp.down_proj": (8, 12),
    }
    return {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}


def write(folder: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> Checkpoint:
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return Checkpoint(resolve(str(folder)))


def load(checkpoint: Checkpoint) -> None:
    checkpoint.decoder(torch.device("cpu"), torch.float32, 32, NoProgress())


def test_the_whole_folder_loads(tmp_path: Path) -> None:
    weights = tensors()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)  # of older exporters
    checkpoint = write(tmp_path, CONFIG, weights)
    load(checkpoint)
    assert checkpoint.format() == "F32 safetensors"
    assert not checkpoint.stores_f16()


def test_fp8_is_computed_in_bfloat16(tmp_path: Path) -> None:
    weights = {name: weight.bfloat16() for name, weight in tensors().items()}
    for name in [name for name in weights if "proj" in name]:
        weights[name] = weights[name].to(F8)
        weights[f"{name}_scale_inv"] = torch.ones(1, 1)
    checkpoint = write(tmp_path, CONFIG, weights)
    load(checkpoint)
    assert checkpoint.format() == "F8_E4M3 safetensors"
    assert not checkpoint.stores_f16()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.update({Q_PROJ: torch.ones(8, 7)}), "has shape [8, 7], expected [8, 8]"),
        (lambda w: w.pop(Q_PROJ), f"tensor {Q_PROJ} is missing"),
        (lambda w: w.update(extra=torch.ones(1)), "the architecture does not use extra"),
        (lambda w: w.update({Q_PROJ: torch.ones(8, 8, dtype=torch.int8)}), "torch.int8, accepted"),
        (
            lambda w: w.update({Q_PROJ: w[Q_PROJ].to(F8)}),
            f"tensor {Q_PROJ} is F8_E4M3, but {Q_PROJ}_scale_inv is missing",
        ),
        (
            lambda w: w.update({Q_PROJ: w[Q_PROJ].to(F8), f"{Q_PROJ}_scale_inv": torch.ones(2, 1)}),
            f"tensor {Q_PROJ}_scale_inv has shape [2, 1], expected [1, 1]",
        ),
        (
            lambda w: w.update(
                {Q_PROJ: w[Q_PROJ].to(F8), f"{Q_PROJ}_scale_inv": torch.ones(1, 1).to(F8)}
            ),
            "float8_e4m3fn, accepted: F32, F16, BF16",
        ),
        (
            lambda w: w.update({"model.norm.weight": w["model.norm.weight"].to(F8)}),
            "float8_e4m3fn, accepted: F64, F32, F16, BF16",
        ),
    ],
    ids=["shape", "missing", "left over", "dtype", "scales", "scale shape", "scale type", "vector"],
)
def test_weights_that_do_not_fit(
    tmp_path: Path, edit: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    weights = tensors()
    edit(weights)
    with pytest.raises(ModelLoadError, match=re.escape(message)) as error:
        load(write(tmp_path, CONFIG, weights))
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["LlamaForCausalLN"]},
            "nearest: LlamaForCausalLM; supported: ",
        ),
        ({"architectures": ["A", "B"]}, "exactly one entry"),
        ({"num_key_value_heads": 3}, "3 does not divide 2 heads"),
        ({"hidden_act": "relu6"}, "'relu6' is not known; accepted: silu"),
        ({"hidden_size": None}, "hidden_size"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "spiral"}}, "'spiral' is not supported; supported"),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "quant_method: 'gptq' safetensors are not supported; accepted: fp8, mxfp4, GGUF",
        ),
        ({"quantization_config": {}}, "quantization_config.quant_method: missing"),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            "weight_block_size: one scale for a tensor; accepted: [128, 128]",
        ),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [1, 128]}},
            "weight_block_size: blocks of [1, 128]; accepted: [128, 128]",
        ),
        (
            {"quantization_config": {"quant_method": "fp8", "activation_scheme": "static"}},
            "activation_scheme: found 'static', accepted: dynamic",
        ),
        (
            {
                "architectures": ["MistralForCausalLM"],
                "rope_parameters": {"llama_4_scaling_beta": 0.1},
            },
            "llama_4_scaling_beta needs original_max_position_embeddings",
        ),
        ({"layer_types": ["full_attention"] * 2}, "2 entries for 1 layers"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_configs_that_make_no_sense(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError, match=re.escape(message)) as error:
        load(write(tmp_path, {**CONFIG, **changes}, tensors()))
    assert "config.json" in str(error.value)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, CONFIG, tensors())
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json"):
        checkpoint.text()


def test_a_broken_template_is_told_when_a_chat_needs_it(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    checkpoint = write(tmp_path, CONFIG, tensors())
    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(
        str(tmp_path / "tokenizer.json")
    )
    (tmp_path / "chat_template.jinja").write_text("line one\n{% for %}")
    assets = checkpoint.text()
    assert isinstance(assets.template, Exception)
    assert "line 2" in str(assets.template)


def test_a_dynamic_rope_admits_longer_contexts(tmp_path: Path) -> None:
    """Angles are for the longest sequence that was asked for, and plain by default."""
    changes = {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    write(tmp_path, CONFIG | changes, tensors())
    files = resolve(str(tmp_path))

    def angles(max_seq_len: int | None) -> Tensor:
        options = EngineOptions(device="cpu", dtype="f32", max_seq_len=max_seq_len)
        engine, card = build_engine(files, options, NoProgress())
        (table,) = engine.runner.model.ropes
        assert card.max_model_len == table.shape[0]
        return table

    plain, stretched = angles(None), angles(64)
    assert (plain.shape[0], stretched.shape[0]) == (32, 64)
    assert torch.equal(plain[:, 0], torch.arange(32.0).cos())  # the fastest pair is never stretched
    assert torch.equal(plain[:, 0], stretched[:32, 0])
    # base 10000 of 4 elements becomes 10000 * 3^2, whose second frequency is 1 / 300
    assert torch.allclose(stretched[:, 1], (torch.arange(64.0) / 300).cos())
    assert torch.allclose(plain[:, 1], (torch.arange(32.0) / 100).cos())
    with pytest.raises(OptionError, match="--max-seq-len is 65, the model's context length is 64"):
        angles(65)


DEEPSEEK: dict[str, Any] = CONFIG | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "num_key_value_heads": 2,
    "q_lora_rank": None,
    "kv_lora_rank": 6,
    "qk_nope_head_dim": 3,
    "qk_rope_head_dim": 2,
    "v_head_dim": 4,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
}


EXPERTS: dict[str, Any] = {
    "first_k_dense_replace": 0,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 4,
}
V2 = EXPERTS | {"architectures": ["DeepseekV2ForCausalLM"]}


def deepseek_tensors() -> dict[str, Tensor]:
    shapes = {
        "q_proj": (10, 8),
        "kv_a_proj_with_mqa": (8, 8),
        "kv_a_layernorm": (6,),
        "kv_b_proj": (14, 6),
        "o_proj": (8, 8),
    }
    others = {name: tensor for name, tensor in tensors().items() if "self_attn" not in name}
    prefix = "model.layers.0.self_attn"
    return others | {f"{prefix}.{name}.weight": torch.ones(size) for name, size in shapes.items()}


def test_layers_for_multi_token_prediction_are_left_out(tmp_path: Path) -> None:
    weights = deepseek_tensors()
    weights["model.layers.1.eh_proj.weight"] = torch.ones(8, 16)
    load(write(tmp_path, DEEPSEEK, weights))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_rope_head_dim": 3}, "qk_rope_head_dim: 3 is odd"),
        ({"kv_lora_rank": None}, "kv_lora_rank: missing"),
        ({"first_k_dense_replace": 0}, "num_experts_per_tok: missing"),
        (EXPERTS | {"n_group": 3}, "n_group: 3 does not divide 8 experts"),
        (EXPERTS | {"scoring_func": "softmax"}, "'softmax' is not supported; accepted: sigmoid"),
        (EXPERTS | {"moe_layer_freq": 2}, "moe_layer_freq: only 1 is supported"),
        (V2 | {"topk_method": "noaux_tc"}, "'noaux_tc' is not known; accepted: greedy, group_lim"),
        (V2 | {"norm_topk_prob": True}, "norm_topk_prob: is not supported"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_latent_attention_that_makes_no_sense(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelLoadError, match=re.escape(message)):
        write(tmp_path, DEEPSEEK | changes, deepseek_tensors()).config()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 2}, "num_experts_per_tok: 2 is not supported; accepted: 1"),
        ({"attention_chunk_size": 0}, "attention_chunk_size: 0 is not accepted"),
        ({"floor_scale": 0}, "floor_scale: 0 is not accepted"),
        ({"interleave_moe_layer_step": 0}, "interleave_moe_layer_step: 0 is not accepted"),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers: 2 entries for 1 layers"),
        ({"layer_types": ["sliding_attention"]}, "accepted: full_attention, chunked_attention"),
        ({"layer_types": ["full_attention"] * 2}, "layer_types: 2 entries for 1 layers"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_llama4_that_makes_no_sense(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    llama4 = {"architectures": ["Llama4ForCausalLM"], "intermediate_size_mlp": 16}
    with pytest.raises(ModelLoadError, match=re.escape(message)):
        write(tmp_path, CONFIG | llama4 | changes, tensors()).config()
