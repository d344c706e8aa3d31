"""The models that can be measured without their files: public architectures, by name.

A row holds what the model's published ``config.json`` says about shape and arithmetic, and is read
by the same functions that read such a file.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from squall.loaders.hf_config import ConfigReader
from squall.models.config import DecoderConfig
from squall.models.registry import read_config


def _llama(
    vocab: int, sizes: tuple[int, int], layers: int, heads: tuple[int, int], **more: Any
) -> dict[str, Any]:
    """``sizes`` are hidden and intermediate, ``heads`` query and key/value heads."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocab,
        "hidden_size": sizes[0],
        "intermediate_size": sizes[1],
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "rms_norm_eps": 1e-5,
        **more,
    }


def _llama3(
    sizes: tuple[int, int], layers: int, heads: tuple[int, int], factor: float, tied: bool
) -> dict[str, Any]:
    rope = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return _llama(
        128256,
        sizes,
        layers,
        heads,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        rope_scaling=rope,
        tie_word_embeddings=tied,
    )


def _qwen(
    generation: int,
    vocab: int,
    sizes: tuple[int, int],
    layers: int,
    heads: tuple[int, int],
    tied: bool,
) -> dict[str, Any]:
    return _llama(
        vocab,
        sizes,
        layers,
        heads,
        architectures=[f"Qwen{generation}ForCausalLM"],
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        max_position_embeddings=32768 if generation == 2 else 40960,
        tie_word_embeddings=tied,
    )


def _gemma3(
    sizes: tuple[int, int], layers: int, heads: tuple[int, int], window: int
) -> dict[str, Any]:
    return _llama(
        262144,
        sizes,
        layers,
        heads,
        architectures=["Gemma3ForCausalLM"],
        rms_norm_eps=1e-6,
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window=window,
        sliding_window_pattern=6,
        rope_theta=1e6,
        rope_local_base_freq=1e4,
        max_position_embeddings=32768,
        hidden_activation="gelu_pytorch_tanh",
    )


def _gemma2(sizes: tuple[int, int], layers: int, heads: tuple[int, int]) -> dict[str, Any]:
    return _llama(
        256000,
        sizes,
        layers,
        heads,
        architectures=["Gemma2ForCausalLM"],
        rms_norm_eps=1e-6,
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window=4096,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        max_position_embeddings=8192,
        hidden_activation="gelu_pytorch_tanh",
    )


_DEEPSEEK_V2_LITE = _llama(
    102400,
    (2048, 10944),
    27,
    (16, 16),
    architectures=["DeepseekV2ForCausalLM"],
    rms_norm_eps=1e-6,
    max_position_embeddings=163840,
    q_lora_rank=None,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    rope_scaling={
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
    first_k_dense_replace=1,
    moe_intermediate_size=1408,
    n_routed_experts=64,
    n_shared_experts=2,
    num_experts_per_tok=6,
    n_group=1,
    topk_group=1,
    topk_method="greedy",
    norm_topk_prob=False,
    routed_scaling_factor=1.0,
    scoring_func="softmax",
)
_SMOL = {"max_position_embeddings": 8192, "tie_word_embeddings": True}

CASES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "deepseek-v2-lite": _DEEPSEEK_V2_LITE,
        "gemma-2-2b": _gemma2((2304, 9216), 26, (8, 4)),
        "gemma-2-9b": _gemma2((3584, 14336), 42, (16, 8)),
        "gemma-3-270m": _gemma3((640, 2048), 18, (4, 1), window=512),
        "gemma-3-1b": _gemma3((1152, 6912), 26, (4, 1), window=512),
        "llama-3.2-1b": _llama3((2048, 8192), 16, (32, 8), factor=32.0, tied=True),
        "llama-3.2-3b": _llama3((3072, 8192), 28, (24, 8), factor=32.0, tied=True),
        "llama-3.1-8b": _llama3((4096, 14336), 32, (32, 8), factor=8.0, tied=False),
        "mistral-7b": _llama(
            32768,
            (4096, 14336),
            32,
            (32, 8),
            architectures=["MistralForCausalLM"],
            max_position_embeddings=32768,
            rope_theta=1e6,
            sliding_window=None,
        ),
        "mixtral-8x7b": _llama(
            32000,
            (4096, 14336),
            32,
            (32, 8),
            architectures=["MixtralForCausalLM"],
            max_position_embeddings=32768,
            rope_theta=1e6,
            num_local_experts=8,
            num_experts_per_tok=2,
        ),
        "phi-3.5-mini": _llama(
            32064,
            (3072, 8192),
            32,
            (32, 32),
            architectures=["Phi3ForCausalLM"],
            max_position_embeddings=131072,
            sliding_window=262144,
        ),
        "qwen2.5-0.5b": _qwen(2, 151936, (896, 4864), 24, (14, 2), tied=True),
        "qwen2.5-7b": _qwen(2, 152064, (3584, 18944), 28, (28, 4), tied=False),
        "qwen3-0.6b": {**_qwen(3, 151936, (1024, 3072), 28, (16, 8), tied=True), "head_dim": 128},
        "qwen3-8b": {**_qwen(3, 151936, (4096, 12288), 36, (32, 8), tied=False), "head_dim": 128},
        "qwen3-30b-a3b": {
            **_qwen(3, 151936, (2048, 6144), 48, (32, 4), tied=False),
            "architectures": ["Qwen3MoeForCausalLM"],
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
        },
        "smollm2-135m": _llama(49152, (576, 1536), 30, (9, 3), rope_theta=1e5, **_SMOL),
        "smollm2-1.7b": _llama(49152, (2048, 8192), 24, (32, 32), rope_theta=1.3e5, **_SMOL),
    }
)


def case_config(name: str) -> DecoderConfig:
    """The decoder of one row. ``ValueError`` for a name that is not in the table."""
    if name not in CASES:
        raise ValueError(f"no case {name!r}; known: {', '.join(CASES)}")
    data = CASES[name]
    return read_config(data["architectures"][0], ConfigReader(data, name))


def attention_shapes(config: DecoderConfig) -> list[tuple[int, int]]:
    """(out_features, in_features) of the matrices of one layer's attention."""
    hidden, q = config.hidden_size, config.num_heads * config.head_dim
    out = (hidden, config.num_heads * config.value_dim)
    mla = config.mla
    if mla is None:
        return [(q + 2 * config.num_kv_heads * config.head_dim, hidden), out]
    latent = mla.kv_lora_rank + mla.qk_rope_head_dim
    kv = (config.num_heads * (mla.qk_nope_head_dim + mla.v_head_dim), mla.kv_lora_rank)
    if mla.q_lora_rank is None:
        return [(q + latent, hidden), kv, out]
    return [(mla.q_lora_rank + latent, hidden), (q, mla.q_lora_rank), kv, out]


def weight_shapes(config: DecoderConfig, split_values: bool) -> list[tuple[int, int]]:
    """(out_features, in_features) of every product of a decoder step but those of experts, head
    last, without repeats.

    q, k and v are one product. ``split_values``: v is one of its own, as in quantised files that
    give it a type of its own.
    """
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden = config.hidden_size
    attention, sizes, routers = attention_shapes(config), [], []
    if not all(layer.experts for layer in config.layers):
        sizes.append(config.intermediate_size)
    if config.moe is not None:
        routers.append((config.moe.experts, hidden))
        sizes += [config.moe.shared_size] if config.moe.shared else []
    mlp = [shape for size in sizes for shape in ((2 * size, hidden), (hidden, size))]
    if config.mla is not None:
        del attention[-2]  # used head by head, or for the tokens of whole prompts
    elif split_values:
        attention[1:1] = [(q + kv, hidden), (kv, hidden)]
    shapes = [
        *attention,
        *routers,
        *mlp,
        (config.vocab_size, hidden),
    ]
    return list(dict.fromkeys(shapes))
