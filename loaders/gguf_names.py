"""Hugging Face parameter names and the GGUF tensors that hold them.

One ``NameMap`` for each architecture, as data. Besides the names it says what llama.cpp's
converter changed on the way, so that a loader can undo or account for it. Names: the ``gguf``
package's ``tensor_mapping``.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import Tensor

_PARAMETER = re.compile(  # a parameter that is no module's has no kind
    r"model\.layers\.(?P<layer>\d+)\.(?P<module>.+?)(\.(?P<kind>weight|bias))?"
)
_TENSOR = re.compile(r"blk\.(?P<layer>\d+)\.(?P<module>.+)\.(?P<kind>weight|bias)")

_OUTER = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_TIED_OUTER = {module: name for module, name in _OUTER.items() if module != "lm_head"}
_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_FUSED = {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"}
_QKV = tuple(f"self_attn.{name}_proj" for name in "qkv")
_PARTS = {*_QKV, "mlp.gate_proj", "mlp.up_proj"}
_PLAIN = {k: v for k, v in _BLOCK.items() if k != "mlp.gate_proj"}
_PARALLEL = {k: v for k, v in _BLOCK.items() if k != "post_attention_layernorm"}
_QK_NORM = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_GEMMA_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_EXPERTS = {
    f"mlp.experts.{{}}.{name}_proj.weight": (f"ffn_{name}_exps.weight",)
    for name in ("gate", "up", "down")
}
_LETTERED_EXPERTS = {  # of Mixtral
    f"block_sparse_moe.experts.{{}}.{letter}.weight": (f"ffn_{name}_exps.weight",)
    for letter, name in (("w1", "gate"), ("w2", "down"), ("w3", "up"))
}
_ATTENTION = {k: v for k, v in _BLOCK.items() if not k.startswith("mlp.")}
_ROUTED = _ATTENTION | {"mlp.gate": "ffn_gate_inp"}
_LETTERED = _ATTENTION | {"block_sparse_moe.gate": "ffn_gate_inp"}


def _shared_mlp(module: str) -> Mapping[str, str]:
    """The MLP beside a layer's experts."""
    return {f"mlp.{module}.{n}_proj": f"ffn_{n}_shexp" for n in ("gate", "up", "down")}


_DEEPSEEK = {
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate.e_score_correction": "exp_probs_b",
    **_shared_mlp("shared_experts"),
}
_ALTUP = {
    "altup.correct_output_scale": "altup_correct_scale",
    "altup.correction_coefs": "altup_correct_coef",
    "altup.prediction_coefs": "altup_predict_coef",
    "altup.modality_router": "altup_router",
    "altup.router_norm": "altup_router_norm",
    "laurel.linear_left": "laurel_l",
    "laurel.linear_right": "laurel_r",
    "laurel.post_laurel_norm": "laurel_post_norm",
    "per_layer_input_gate": "inp_gate",
    "per_layer_projection": "proj",
    "post_per_layer_input_norm": "post_norm",
}
_ALTUP_OUTER = {
    "model.embed_tokens_per_layer": "per_layer_token_embd",
    "model.per_layer_model_projection": "per_layer_model_proj",
    "model.per_layer_projection_norm": "per_layer_proj_norm",
    "model.altup_projections": "altup_proj",
    "model.altup_unembed_projections": "altup_unembd_proj",
}


@dataclass(frozen=True)
class NameMap:
    """The tensors of one GGUF architecture.

    ``block`` and ``outer`` map modules (names without ``.weight`` / ``.bias``), inside the layers
    and outside. ``permuted`` maps the block modules whose rows llama.cpp reorders for its
    adjacent-pair rope to the config key with their number of heads. ``stacks`` are outer modules of
    which there are several, numbered, in one tensor. ``split`` maps modules of a layer that are in
    several tensors to these, ``experts`` the tensors of a layer's experts to those that hold them,
    one below the other both. ``norm_shift`` is what the converter added to every norm weight.
    ``consumed`` are tensors that are no parameters: the config carries what they say.
    """

    block: Mapping[str, str]
    outer: Mapping[str, str] = field(default_factory=lambda: _OUTER)
    split: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    experts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    permuted: Mapping[str, str] = field(default_factory=dict)
    stacks: frozenset[str] = frozenset()
    norm_shift: float = 0.0
    consumed: frozenset[str] = frozenset(
        {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
    )

    def gguf_name(self, parameter: str) -> str:
        """``model.layers.3.self_attn.q_proj.weight`` -> ``blk.3.attn_q.weight``; a correction of
        scores is a bias.

        KeyError: the architecture has no such parameter.
        """
        match = _PARAMETER.fullmatch(parameter.replace("correction_bias", "correction.bias"))
        if match:
            name = f"blk.{match['layer']}.{self.block[match['module']]}"
            return f"{name}.{match['kind'] or 'weight'}"
        module, _, kind = parameter.rpartition(".")
        if self.place_in_stack(parameter) is not None:
            module = module.rpartition(".")[0]
        return f"{self.outer[module]}.{kind}"

    def place_in_stack(self, parameter: str) -> int | None:
        """Which of the matrices of its tensor a parameter is; None where the tensor is one."""
        stem, _, place = parameter.rpartition(".")[0].rpartition(".")
        return int(place) if stem in self.stacks else None

    def split_tensors(self, parameter: str) -> tuple[str, ...]:
        """The tensors that a weight is in together; none if it is one tensor."""
        match = _PARAMETER.fullmatch(parameter)
        if not match:
            return ()
        parts = self.split.get(match["module"], ())
        return tuple(f"blk.{match['layer']}.{own}.weight" for own in parts)

    def expert_tensors(self, parameter: str) -> tuple[str, ...]:
        """``model.layers.3.mlp.experts.{}.up_proj.weight`` -> ``blk.3.ffn_up_exps.weight``."""
        _, _, layer, name = parameter.split(".", 3)
        return tuple(f"blk.{layer}.{own}" for own in self.experts[name])

    def parameter_name(self, tensor: str) -> str | None:
        """The inverse of ``gguf_name``; None for a tensor that is no parameter."""
        match = _TENSOR.fullmatch(tensor)
        table = self.block if match else self.outer
        stem, _, kind = (match["module"], "", match["kind"]) if match else tensor.rpartition(".")
        module = next((module for module, name in table.items() if name == stem), None)
        if module is None or kind not in ("weight", "bias"):
            return None
        return f"model.layers.{match['layer']}.{module}.{kind}" if match else f"{module}.{kind}"

    def permuted_heads(self, parameter: str, config: Mapping[str, Any]) -> int:
        """Heads to ``unpermute_rows`` of a parameter by; 0: its rows are in order."""
        match = _PARAMETER.fullmatch(parameter)
        key = self.permuted.get(match["module"]) if match else None
        return int(config[key]) if key else 0


_LLAMA = NameMap(
    block=_BLOCK,
    permuted={
        "self_attn.q_proj": "num_attention_heads",
        "self_attn.k_proj": "num_key_value_heads",
    },
)
_MIXTRAL = NameMap(_BLOCK | _LETTERED, experts=_LETTERED_EXPERTS, permuted=_LLAMA.permuted)
_OLMO2 = NameMap(
    block={k: v for k, v in _BLOCK.items() if k != "input_layernorm"}
    | _QK_NORM
    | {
        "post_attention_layernorm": "post_attention_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    }
)
NAME_MAPS: Mapping[str, NameMap] = MappingProxyType(
    {
        "llama": _MIXTRAL,
        "qwen2": NameMap(block=_BLOCK),
        "qwen3": NameMap(block=_BLOCK | _QK_NORM),
        "granite": _LLAMA,
        "smollm3": _LLAMA,
        "phi2": NameMap(
            block={k: _BLOCK[k] for k in ("input_layernorm", *_QKV)}
            | {"self_attn.dense": "attn_output", "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down"},
            outer={
                "model.embed_tokens": "token_embd",
                "model.final_layernorm": "output_norm",
                "lm_head": "output",
            },
        ),
        "phi3": NameMap(block={k: v for k, v in _BLOCK.items() if k not in _PARTS} | _FUSED),
        "glm4": NameMap(
            block={k: v for k, v in _BLOCK.items() if k not in ("mlp.gate_proj", "mlp.up_proj")}
            | {
                "mlp.gate_up_proj": "ffn_up",
                "post_self_attn_layernorm": "post_attention_norm",
                "post_mlp_layernorm": "post_ffw_norm",
            }
        ),
        "ernie4_5": NameMap(block=_BLOCK),
        "arcee": NameMap(block=_PLAIN, permuted=_LLAMA.permuted),
        "nemotron": NameMap(block=_PLAIN, norm_shift=1.0),
        "seed_oss": NameMap(block=_BLOCK | {"post_attention_layernorm": "post_attention_norm"}),
        "exaone4": _OLMO2,
        "hunyuan-dense": NameMap(
            block=_BLOCK
            | {"self_attn.query_layernorm": "attn_q_norm", "self_attn.key_layernorm": "attn_k_norm"}
        ),
        "olmo": NameMap(
            block={k: v for k, v in _BLOCK.items() if not k.endswith("layernorm")},
            outer={"model.embed_tokens": "token_embd", "lm_head": "output"},
            permuted=_LLAMA.permuted,
        ),
        "olmo2": _OLMO2,
        "stablelm": NameMap(
            block=_BLOCK
            | {"self_attn.q_layernorm": "attn_q_norm", "self_attn.k_layernorm": "attn_k_norm"}
        ),
        "starcoder2": NameMap(
            block={k: v for k, v in _BLOCK.items() if not k.startswith("mlp.")}
            | {"mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
        ),
        "deepseek2": NameMap(
            block={k: v for k, v in _BLOCK.items() if k not in _QKV[1:]}
            | {
                "self_attn.q_a_proj": "attn_q_a",
                "self_attn.q_a_layernorm": "attn_q_a_norm",
                "self_attn.q_b_proj": "attn_q_b",
                "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
                "self_attn.kv_a_layernorm": "attn_kv_a_norm",
                "self_attn.kv_b_proj": "attn_kv_b",
                "self_attn.k_b_proj": "attn_k_b",
                "self_attn.v_b_proj": "attn_v_b",
                **_DEEPSEEK,
            },
            experts=_EXPERTS,
        ),
        "qwen2moe": NameMap(
            block=_ROUTED
            | {"mlp.shared_expert_gate": "ffn_gate_inp_shexp", **_shared_mlp("shared_expert")},
            experts=_EXPERTS,
        ),
        "qwen3moe": NameMap(_ROUTED | _QK_NORM, experts=_EXPERTS),
        "gpt-oss": NameMap(
            block=_ATTENTION
            | {
                "self_attn.sinks": "attn_sinks",
                "post_attention_layernorm": "post_attention_norm",
                "mlp.router": "ffn_gate_inp",
            },
            experts={
                "mlp.experts.gate_up_proj": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
                "mlp.experts.gate_up_proj_bias": ("ffn_gate_exps.bias", "ffn_up_exps.bias"),
                "mlp.experts.down_proj": ("ffn_down_exps.weight",),
                "mlp.experts.down_proj_bias": ("ffn_down_exps.bias",),
            },
        ),
        "phimoe": NameMap(_LETTERED, experts=_LETTERED_EXPERTS),
        "granitemoe": NameMap(
            block=_ATTENTION
            | {
                "block_sparse_moe.router.layer": "ffn_gate_inp",
                "shared_mlp.output_linear": "ffn_down_shexp",
            },
            split={"shared_mlp.input_linear": ("ffn_gate_shexp", "ffn_up_shexp")},
            experts={
                "block_sparse_moe.input_linear.weight": (
                    "ffn_gate_exps.weight",
                    "ffn_up_exps.weight",
                ),
                "block_sparse_moe.output_linear.weight": ("ffn_down_exps.weight",),
            },
            permuted=_LLAMA.permuted,
        ),
        "olmoe": NameMap(_ROUTED | _QK_NORM, experts=_EXPERTS),
        "glm4moe": NameMap(
            block=_BLOCK
            | _QK_NORM
            | _DEEPSEEK
            | {"post_attention_layernorm": "post_attention_norm"},
            experts=_EXPERTS,
        ),
        "ernie4_5-moe": NameMap(
            block=_BLOCK
            | {
                "mlp.gate": "ffn_gate_inp",
                "mlp.moe_statics.e_score_correction": "exp_probs_b",
                **_shared_mlp("shared_experts"),
            },
            experts=_EXPERTS,
        ),
        "hunyuan-moe": NameMap(
            block=_ATTENTION
            | {
                "self_attn.query_layernorm": "attn_q_norm",
                "self_attn.key_layernorm": "attn_k_norm",
                "mlp.gate.wg": "ffn_gate_inp",
                **_shared_mlp("shared_mlp"),
            },
            experts=_EXPERTS,
        ),
        "command-r": NameMap(_PARALLEL | _QK_NORM, _TIED_OUTER),
        "cohere2": NameMap(_PARALLEL, _TIED_OUTER),
        "gemma": NameMap(_BLOCK, _TIED_OUTER, norm_shift=1.0),
        "gemma2": NameMap(_BLOCK | _GEMMA_NORMS, _TIED_OUTER, norm_shift=1.0),
        "gemma3n": NameMap(
            block=_BLOCK | _QK_NORM | _GEMMA_NORMS | _ALTUP,
            outer=_TIED_OUTER | _ALTUP_OUTER,
            stacks=frozenset({"model.altup_projections", "model.altup_unembed_projections"}),
        ),
        "gemma3": NameMap(block=_BLOCK | _QK_NORM | _GEMMA_NORMS, norm_shift=1.0),
    }
)
"""By ``general.architecture``; the same keys as ``gguf_architectures.ARCHITECTURES``."""


def unpermute_rows(rows: Tensor, heads: int) -> Tensor:
    """Put the rows of a llama q or k projection back into Hugging Face's order.

    ``rows``: ``[heads * D, ...]``, weights, biases or the raw bytes of quantised rows. llama.cpp
    stores row ``i`` and row ``i + D/2`` of a head next to each other (rope on adjacent pairs);
    half-split rope wants them ``D/2`` apart. Returns a new tensor of the same shape.
    """
    assert heads > 0, heads
    assert rows.shape[0] % (2 * heads) == 0, (tuple(rows.shape), heads)
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)
