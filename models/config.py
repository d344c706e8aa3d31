"""``DecoderConfig``: everything a text decoder's shape and arithmetic depend on."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

Activation = Literal["silu", "gelu_tanh", "clamped_silu", "relu2", "xielu"]


class ConfigReader(Protocol):
    """Typed reads from a ``config.json``-like mapping; errors name the key and the file."""

    file: str

    def has(self, key: str) -> bool: ...
    def is_list(self, key: str) -> bool: ...
    def get_int(self, key: str, default: Any = ...) -> Any: ...
    def get_float(self, key: str, default: Any = ...) -> Any: ...
    def get_bool(self, key: str, default: Any = ...) -> Any: ...
    def get_str(self, key: str, default: Any = ...) -> Any: ...
    def get_list(self, key: str, default: Any = ...) -> Any: ...
    def get_each(self, key: str, count: int) -> list[int]:
        """``count`` integers; a single one is taken for all."""
        ...

    def rope(self, layer_type: str | None = None) -> Mapping[str, Any]:
        """Rope settings of one layer type in the flat form ``{rope_type, rope_theta, ...}``."""
        ...

    def sub(self, key: str) -> "ConfigReader":
        """A reader over a nested object, which must be there."""
        ...

    def fail(self, key: str, message: str) -> Exception:
        """The error to raise for a value that cannot be used."""
        ...


@dataclass(frozen=True)
class RopeConfig:
    """One rotary table: the first ``dim`` elements of a head are rotated."""

    dim: int
    theta: float = 10000.0
    rule: str = "default"
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class QueryGrowth:
    """Scores grow with the position p of the query by ``1 + beta ln(1 + floor((p + ahead) /
    every))`` (Llama 4, Ministral 3)."""

    beta: float
    every: int  # tokens
    ahead: int = 0  # tokens


@dataclass(frozen=True)
class LayerConfig:
    """What may differ from layer to layer."""

    window: int = 0  # which keys a query sees: squall.kernels.attention.window; 0: all
    rope: int = 0  # index into DecoderConfig.ropes
    experts: bool = False  # a mixture of experts instead of the MLP
    shares: int | None = None  # the earlier layer whose keys and values it reads, having none
    unit_qk_norm: bool = False  # RMS norms of the heads of q and k, without weights
    query_growth: QueryGrowth | None = None


@dataclass(frozen=True)
class MLAConfig:
    """Sizes of multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): a token's keys and
    values are products of one latent vector, besides a rotated part that all heads share."""

    q_lora_rank: int | None  # queries are a product of a latent of this size, or of the stream
    kv_lora_rank: int
    qk_nope_head_dim: int  # a head of q and k is this part, which is not rotated,
    qk_rope_head_dim: int  # and then this one
    v_head_dim: int


class KVShape(NamedTuple):
    """What a layer's cache holds of a token: for each of ``heads`` heads a key and a value."""

    heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True)
class NormNames:
    """The norms of a layer by their names in checkpoints, None for those it has not: before
    attention and MLP, and behind them, before the residual add."""

    attention: str | None = "input_layernorm"
    mlp: str | None = "post_attention_layernorm"
    after_attention: str | None = None
    after_mlp: str | None = None


@dataclass(frozen=True)
class AltUpConfig:
    """Several residual streams of which the layers compute one (``squall.models.altup``), and an
    embedding of the token for each layer."""

    streams: int
    active: int  # the stream that attention and MLP read
    scaled: bool  # the corrected stream is scaled for the token's input
    laurel_rank: int
    input_size: int  # of the embedding for each layer
    input_vocab: int  # tokens that have one; others take that of token 0
    intermediate_sizes: tuple[int, ...]  # of each layer
    sparsity: tuple[float, ...]  # of each layer, the share of gates that are closed


@dataclass(frozen=True)
class RouterConfig:
    """How tokens find their experts; see :mod:`squall.kernels.moe.route`."""

    top_k: int
    scoring: str = "softmax"
    renormalize: bool = False
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    group_best: int = 1
    jitter: float = 0.0


@dataclass(frozen=True)
class MoEConfig:
    """A mixture of experts: sizes, and the names of its modules below ``model.layers.N``; ``{}``
    stands for the number of an expert, without it a tensor has all experts."""

    experts: int
    intermediate_size: int  # of an expert
    router: RouterConfig
    gate: str = "mlp.gate"
    correction: str | None = None  # the name of a tensor
    correction_shape: tuple[int, ...] = ()  # in checkpoints; (): one number for each expert
    router_bias: bool = False
    gate_up: tuple[str, ...] = ("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight")
    down: str = "mlp.experts.{}.down_proj.weight"
    biases: tuple[str, str] | None = None  # of gate and up, and of down: tensors of all experts
    transposed: bool = False  # checkpoints have [in, out] for every expert
    interleaved: bool = False  # and gate and up rows in turn
    scaled_input: bool = (
        False  # an expert's weight multiplies what goes in instead of what comes out
    )
    shared: str | None = None  # an MLP that all tokens go through
    shared_size: int = 0
    shared_names: tuple[tuple[str, ...], str] = (("gate_proj", "up_proj"), "down_proj")
    shared_gate: str | None = None  # its weight for a token is the sigmoid of this


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer; sizes are counts of elements."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    norm_eps: float
    layers: tuple[LayerConfig, ...]
    ropes: tuple[RopeConfig, ...]
    tie_embeddings: bool
    attention_scale: float
    activation: Activation = "silu"  # without a gate also "relu2", "xielu"; not "silu"
    qkv_bias: bool = False
    qkv_clip: float = 0.0  # q, k, v are kept within this of zero; 0: not
    o_bias: bool = False
    mlp_bias: bool = False
    parallel: bool = False  # attention and MLP read the same stream
    plain_mlp: tuple[str, str] | None = None  # an MLP without gate: names of its two projections
    mlp_name: str = "mlp"  # in checkpoints
    attention_out: str = "o_proj"  # its name in checkpoints
    final_norm: str = "model.norm"
    head_bias: bool = False
    fused_qkv: bool = False  # checkpoints have one tensor of q, k and v
    fused_gate_up: bool = False  # and one of gate and up
    interleaved_rope: bool = False  # what is rotated together lies side by side in checkpoints
    qk_norm: bool = False
    wide_qk_norm: bool = False  # one norm over all heads of q, one over those of k
    head_layer_norm: bool = False  # layer norms of the heads of q and k, a weight for each head
    qk_norm_names: tuple[str, str] = ("q_norm", "k_norm")  # in checkpoints
    v_norm: bool = False  # RMS norms of the heads of v, without weights
    qk_norm_after_rope: bool = False  # that of qk_norm; the others come before it
    layer_norm: bool = False  # layer norms instead of RMS norms
    norm_bias: bool = False  # of layer norms
    plain_norms: bool = False  # layer norms without weights
    norm_offset: float = 0.0  # added to every norm weight of a Hugging Face checkpoint
    norms: NormNames = NormNames()
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    attention_softcap: float = 0.0
    sinks: bool = False  # every head has a logit that takes its share of attention and has no value
    logit_softcap: float = 0.0
    altup: AltUpConfig | None = None
    moe: MoEConfig | None = None
    wide_range: bool = False  # activations are known to leave float16's range
    mla: MLAConfig | None = None  # latent attention instead of grouped-query attention

    @property
    def longest_position(self) -> int:
        """The context (tokens) that may be asked for: dynamic ropes stretch beyond the default."""
        stretched = (r.settings["factor"] for r in self.ropes if r.rule == "dynamic")
        return int(self.max_position * max(stretched, default=1.0))

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @cached_property
    def caches(self) -> tuple[int, ...]:
        """Each layer's place in the cache."""
        places: list[int] = []
        new = itertools.count()
        for layer in self.layers:
            places.append(next(new) if layer.shares is None else places[layer.shares])
        return tuple(places)

    @cached_property
    def num_caches(self) -> int:
        """Layers with keys and values of their own."""
        return sum(layer.shares is None for layer in self.layers)

    @property
    def value_dim(self) -> int:
        """Elements of a head of what attention hands on."""
        return self.mla.v_head_dim if self.mla else self.head_dim

    @property
    def attention_width(self) -> int:
        """Numbers a token has in a layer's queries, keys, values and what is made of them."""
        if self.mla:
            kv = self.num_heads * (self.mla.qk_nope_head_dim + self.mla.v_head_dim)
        else:
            kv = 2 * self.num_kv_heads * self.head_dim
        return self.num_heads * (self.head_dim + self.value_dim) + kv

    @property
    def kv_shape(self) -> KVShape:
        """The cache of one layer. Latent attention has one key a token, the latent and the rotated
        part; its values are the latent, and kept nowhere else."""
        if self.mla:
            return KVShape(1, self.mla.kv_lora_rank + self.mla.qk_rope_head_dim, 0)
        return KVShape(self.num_kv_heads, self.head_dim, self.head_dim)

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of key/value cache one token takes over all layers."""
        shape = self.kv_shape
        return self.num_caches * shape.heads * (shape.key_dim + shape.value_dim) * itemsize
