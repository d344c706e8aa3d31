"""Paged attention through xformers (``xformers.ops.fmha``, PagedBlockDiagonal biases).

``paged_attention`` takes what the operator of that name takes (``squall.kernels.attention.paged``)
and can stand in for it: decode steps go to xformers' Triton split-K operator, prompts to Flash
Attention 3 or 2, whichever xformers has with paged keys. The biases are made of the index tensors
as they are, without a copy from the host. Rows of sequences without context are undefined here.
Written against the interface of xformers 0.0.35.
"""

import functools
from typing import Any

import torch
from torch import Tensor

# What the split-K operator and both flash kernels take.
HEAD_DIMS = (64, 128, 256)
BLOCK_SIZES = (16, 32, 64)
DTYPES = (torch.float16, torch.bfloat16)


@functools.cache
def probe() -> str | None:
    """Why xformers cannot be used here, in one line, or None. Imports it."""
    if not torch.cuda.is_available():
        return "xformers needs a CUDA GPU"
    if torch.cuda.get_device_capability() < (8, 0):
        return "xformers' paged attention needs compute capability 8.0"
    try:
        from xformers import __version__, _cpp_lib
        from xformers.ops.fmha import attn_bias, triton_splitk

        bias = attn_bias.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask
        _seqlen_types()
    except ImportError as error:
        missing = error.name == "xformers"
        return "xformers is not installed" if missing else f"xformers cannot be imported: {error}"
    except AttributeError as error:
        return f"xformers {__version__} has other attention biases: {error}"
    if triton_splitk.FwOp.OPERATOR is None:
        return f"xformers {__version__} does not find Triton"
    if _prompt_operator() is None:
        failure = _cpp_lib._cpp_library_load_exception
        if failure is None:
            return f"xformers {__version__} has no operator for prompts with {bias.__name__}"
        built = getattr(failure.build_info, "torch_version", "another version")
        return (
            f"xformers {__version__} was built for torch {built}, not for {torch.__version__}, "
            "and has no operator for paged prompts without its C++ part"
        )
    return None


def refusal(
    head_dim: int, block_size: int, dtypes: tuple[torch.dtype, torch.dtype], features: set[str]
) -> str | None:
    """Why a model cannot use xformers, in one line, or None. ``dtypes`` are those of the queries
    and of the cache, ``features`` what its attention has of "window",
    "chunks", "softcap", "sinks"."""
    if features:
        return f"xformers' paged attention has no {', no '.join(sorted(features))}"
    if head_dim not in HEAD_DIMS:
        return f"xformers' paged attention has no heads of {head_dim}; it has {_listed(HEAD_DIMS)}"
    if block_size not in BLOCK_SIZES:
        sizes = _listed(BLOCK_SIZES)
        return f"xformers' paged attention has no blocks of {block_size} tokens; it has {sizes}"
    if dtypes[0] not in DTYPES or dtypes[0] != dtypes[1]:
        return (
            "xformers' paged attention wants queries and cache both float16 or both bfloat16, "
            f"not {dtypes[0]} and {dtypes[1]}"
        )
    return None


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    max_query_len: int,
    max_context_len: int,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """Raises ``ValueError`` for what ``refusal`` names."""
    tokens, heads, dim = q.shape
    block_size, kv_heads = k_cache.shape[1:3]
    features = {
        "window": window > 0,
        "chunks": window < 0,
        "softcap": softcap > 0,
        "sinks": sinks is not None,
    }
    asked = {name for name, there in features.items() if there}
    reason = refusal(dim, block_size, (q.dtype, k_cache.dtype), asked)
    if reason is not None:
        raise ValueError(reason)
    if tokens == 0:
        return torch.empty(q.shape, dtype=q.dtype, device=q.device)
    from xformers.ops import fmha

    lengths = max_query_len, max_context_len
    bias = _bias(block_tables, query_start, context_lens, lengths, tokens, block_size)
    # A group of query heads reads one kv head: expanded, which copies nothing.
    shape = (1, -1, kv_heads, heads // kv_heads, dim)
    k, v = (c.view(1, -1, kv_heads, 1, dim).expand(shape) for c in (k_cache, v_cache))
    operator = _decode_operator(block_size) if max_query_len == 1 else _prompt_operator()
    rows = q.unflatten(1, (kv_heads, heads // kv_heads)).unsqueeze(0)  # type: ignore[no-untyped-call]
    out = fmha.memory_efficient_attention_forward(rows, k, v, bias, scale=scale, op=operator)
    return out.reshape(q.shape)


def _seqlen_types() -> tuple[Any, Any]:
    from xformers.ops.fmha import attn_bias

    return attn_bias._SeqLenInfo, attn_bias._PaddedSeqLenInfo


def _bias(
    tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    longest: tuple[int, int],
    tokens: int,
    block_size: int,
) -> Any:
    """The paged causal bias. xformers' own constructors take lengths from the host and upload them;
    of the host's copies its operators read the largest, and how many queries there are."""
    from xformers.ops.fmha.attn_bias import PagedBlockDiagonalCausalWithOffsetPaddedKeysMask

    queries, keys = _seqlen_types()
    sequences, padding = tables.shape[0], tables.shape[1] * block_size
    starts = torch.arange(sequences + 1, dtype=torch.int32, device=tables.device) * padding
    return PagedBlockDiagonalCausalWithOffsetPaddedKeysMask(
        q_seqinfo=queries(
            seqstart=query_start,
            max_seqlen=longest[0],
            min_seqlen=1,
            seqstart_py=[0] * sequences + [tokens],
        ),
        k_seqinfo=keys(
            seqstart=starts,
            max_seqlen=longest[1],
            min_seqlen=0,
            seqstart_py=[i * padding for i in range(sequences + 1)],
            seqlen=context_lens,
            seqlen_py=[longest[1]] * sequences,
            padding=padding,
        ),
        block_tables=tables.clamp_min(0),  # unused entries are -1, and may be looked at here
        page_size=block_size,
    )


@functools.cache
def _decode_operator(block_size: int) -> Any:
    """Split-K with tiles of keys that lie within one block."""
    from xformers.ops.fmha import triton_splitk

    return type("PagedSplitK", (triton_splitk.FwOp,), {"BLOCK_N": block_size})


@functools.cache
def _prompt_operator() -> Any:
    """The first operator that takes paged keys and queries of any length, or None."""
    from xformers.ops.fmha import attn_bias, dispatch, flash, flash3

    paged = attn_bias.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask
    candidates = [flash3.FwOp] if dispatch.fa3_available() else []
    for operator in (*candidates, flash.FwOp):
        if paged in operator.SUPPORTED_ATTN_BIAS_TYPES and operator.is_available():
            return operator
    return None
