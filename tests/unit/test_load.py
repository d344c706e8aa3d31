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


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.update({Q_PROJ: torch.ones(8, 7)}), "has shape [8, 7], expected [8, 8]"),
        (lambda w: w.pop(Q_PROJ), f"tensor {Q_PROJ} is missing"),
        (lambda w: w.update(extra=torch.ones(1)), "the architecture does not use extra"),
        (lambda w: w.update({Q_PROJ: torch.ones(8, 8, dtype=torch.int8)}), "torch.int8, accepted"),
    ],
    ids=["shape", "missing", "left over", "dtype"],
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
            "nearest: LlamaForCausalLM; supported: CohereFor",
        ),
        ({"architectures": ["A", "B"]}, "exactly one entry"),
        ({"num_key_value_heads": 3}, "3 does not divide 2 heads"),
        ({"hidden_act": "relu6"}, "'relu6' is not known; accepted: silu"),
        ({"hidden_size": None}, "hidden_size"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "spiral"}}, "'spiral' is not supported; supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised safetensors are not"),
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
    weights["model.layers.2.eh_proj.weight"] = torch.ones(8, 16)
    with pytest.raises(ModelLoadError, match=r"does not use model\.layers\.2\.eh_proj"):
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
