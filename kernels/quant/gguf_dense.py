"""F32, F16, BF16: plain numbers, in GGUF's type codes (GGML ``enum ggml_type``)."""

import torch

from squall.kernels.quant.base import QuantFormat


def _dense(name: str, code: int, dtype: torch.dtype) -> QuantFormat:
    return QuantFormat(
        name=name,
        ggml_type=code,
        block_size=1,
        block_bytes=dtype.itemsize,
        bits=8 * dtype.itemsize,
        group=1,
        signed=True,
        dtype=dtype,
    )


FORMATS = (
    _dense("F32", 0, torch.float32),
    _dense("F16", 1, torch.float16),
    _dense("BF16", 30, torch.bfloat16),
)
