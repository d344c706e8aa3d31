"""MXFP4 under exponents far from those of a model: kernels lose nothing that their numbers hold."""

import pytest
import torch
from torch import Tensor

from squall.kernels.cases import ERROR_LIMITS, random, relative_error
from squall.kernels.quant.base import gguf_formats
from squall.kernels.quant.expand import expand_planes_launcher
from squall.kernels.quant.gemm import plane_gemm_launcher
from squall.kernels.quant.gemv import plane_gemv_launcher, rounded
from squall.kernels.quant.planes import Planes, dequantize, pack

CPU = torch.device("cpu")
MXFP4 = gguf_formats()[39]


def rows_of_powers(low: int, high: int) -> tuple[Planes, Tensor]:
    """A row for each exponent from ``low`` to ``high``, float64 weights beside it; a block of zeros
    in each has the largest exponent of all."""
    count = high - low + 1
    raw = torch.randint(
        0, 256, (count, 8, 17), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    raw[:, :, 0] = torch.arange(low, high + 1)[:, None]
    raw[:, 3, 0], raw[:, 3, 1:] = 255, 0x80
    planes = pack(MXFP4, raw.view(count, -1))
    return planes, dequantize(planes).double()


def assert_close_by_row(got: Tensor, want: Tensor) -> None:
    for i in range(want.shape[1]):
        error = relative_error(got[:, i], want[:, i])
        assert error <= ERROR_LIMITS[torch.float32], f"row {i}: {error:.1e}"


@pytest.mark.filterwarnings("ignore:overflow encountered in multiply:RuntimeWarning")
def test_every_power_expands() -> None:
    planes, want = rows_of_powers(0, 255)
    got = expand_planes_launcher(*planes.tensors, 39, 256, torch.float32)
    assert torch.equal(got.double(), want)


@pytest.mark.parametrize(("low", "high"), [(30, 60), (115, 130), (200, 240)])
def test_byte_products(low: int, high: int) -> None:
    planes, weights = rows_of_powers(low, high)
    x = random((1, 256), torch.float32, CPU, 1)
    out = torch.full((1, len(weights)), torch.nan)
    plane_gemv_launcher(x, None, 0.0, *planes.tensors, 39, None, "none", out)
    assert_close_by_row(out, rounded(x).double() @ weights.t())


def test_tensor_cores() -> None:
    """Weights from 2^-30 to 1023, exactly."""
    planes, weights = rows_of_powers(98, 134)
    x = random((5, 256), torch.float16, CPU, 2)
    out = torch.full((5, len(weights)), torch.nan)
    plane_gemm_launcher(x, *planes.tensors, 39, None, "none", out)
    assert_close_by_row(out, x.double() @ weights.t())
