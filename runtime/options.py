"""``EngineOptions``: what a user may choose about a model and its engine."""

import msgspec


class EngineOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options shared by ``squall run``, ``squall serve`` and ``squall.LLM``.

    ``None`` means "decide from the model and the device"; :mod:`squall.runtime.memory` says how
    the three ``pa_*`` memory settings combine.
    """

    model: str | None = None  # local file or folder, or a hub id (``org/name[@revision]``)
    filename: str | None = None  # the GGUF file inside that folder or repository
    device: str = "auto"  # auto, cpu, cuda[:n], xpu, mps
    dtype: str = "auto"  # auto, f32, f16, bf16
    max_seq_len: int | None = None  # tokens, prompt and output together
    max_seqs: int = 32  # sequences computed at the same time
    max_queue: int = 512  # requests allowed to wait
    token_budget: int | None = None  # tokens of one step
    pa_gpu_mem: int | None = None  # MiB for the KV cache
    pa_gpu_mem_usage: float | None = None  # share of the device's memory, 0..1
    pa_ctxt_len: int | None = None  # tokens the KV cache must hold
    pa_blk_size: int = 32  # tokens per cache block: 8, 16, 32 or 64
    attention_backend: str = "auto"  # auto (the fastest for each step), triton, xformers
    enforce_eager: bool = False  # no CUDA graphs
    token_source: str = "cache"  # literal:V, env:V, path:V, cache, none
    chat_template: str | None = None  # a .jinja or .json file replacing the model's own
