"""Tensor-core products with weights in planes: what the case table does not show."""

import pytest
import torch

from squall.kernels.cases import ERROR_LIMITS, relative_error
from squall.kernels.counters import counters
from squall.kernels.linear_epilogue import Epilogue
from squall.kernels.quant import gemm
from squall.kernels.quant.base import gguf_formats
from squall.kernels.quant.planes import layout, random_planes

FORMATS = [entry for entry in gguf_formats().values() if entry.unpack is not None]
BUCKETS = (16, 32, 64, 128, 256)
SIZES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096), (576, 768))
H100 = {"threads": 2048, "registers": 65536, "shared": 227 * 1024}


@pytest.mark.parametrize("bucket", BUCKETS)
@pytest.mark.parametrize("entry", FORMATS, ids=lambda entry: entry.name)
def test_launch_parameters_are_legal(entry, bucket: int) -> None:
    plan = layout(entry.ggml_type)
    for n, k in SIZES:
        tried = list(gemm.candidates(plan, bucket, n, k))
        assert 1 <= len(tried) <= 16
        assert len({tuple(config.items()) for config in tried}) == len(tried)
        for config in [gemm.rule(plan, bucket, n, k, torch.device("cpu")), *tried]:
            assert config["block_k"] >= (128 if plan.low_bits == 2 or plan.high_bits else 64)
            assert 256 % config["block_k"] == 0
            assert 1 <= config["split"] <= max(1, k // 512)
            assert 32 * config["warps"] * config["registers"] <= H100["registers"]
            planes = plan.low_bits + plan.high_bits + 1
            stage = config["block_m"] * 16 + config["block_n"] * planes
            assert config["stages"] * config["block_k"] * stage // 8 <= H100["shared"]


def test_rule_fills_a_gpu_or_keeps_512_columns() -> None:
    plan = layout(12)  # Q4_K
    for bucket in BUCKETS:
        config = gemm.rule(plan, bucket, 4096, 4096, torch.device("cpu"))
        tiles = 4096 // config["block_n"] * max(1, bucket // config["block_m"])
        assert tiles * config["split"] >= 132


def test_bad_input_is_refused() -> None:
    planes = random_planes(FORMATS[0], 32, 256, torch.device("cpu"))
    arguments = (*planes.tensors, FORMATS[0].ggml_type, None)
    out = torch.empty(3, 32)
    with pytest.raises(AssertionError, match="float32"):
        gemm.plane_gemm_launcher(torch.zeros(3, 256), *arguments, "none", out)
    with pytest.raises(AssertionError, match="at most 256"):
        gemm.plane_gemm_launcher(
            torch.zeros(257, 256).half(), *arguments, "none", torch.empty(257, 32)
        )
    with pytest.raises(AssertionError, match="relu"):
        gemm.plane_gemm_launcher(torch.zeros(3, 256).half(), *arguments, "relu", out)
    with pytest.raises(AssertionError, match="low"):
        gemm.plane_gemm_launcher(torch.zeros(3, 512).half(), *arguments, "none", out)


@pytest.mark.gpu
@pytest.mark.parametrize("bucket", BUCKETS)
@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q5_0", "Q3_K"])
def test_every_candidate_gives_the_same_product(name: str, bucket: int) -> None:
    """And the same bits when run twice, and leaves the counters at zero."""
    device = torch.device("cuda")
    entry = next(entry for entry in FORMATS if entry.name == name)
    n, k = 640, 4096
    planes = random_planes(entry, n, k, device, torch.Generator(device).manual_seed(1))
    x = torch.randn((bucket - 1, k), device=device).half()
    want = torch.zeros((bucket - 1, n), dtype=torch.float16, device=device)
    gemm.plane_gemm_reference(x, *planes.tensors, entry.ggml_type, None, "none", want)
    for config in gemm.candidates(layout(entry.ggml_type), bucket, n, k):
        first, second = torch.full_like(want, torch.nan), torch.full_like(want, torch.nan)
        for out in (first, second):
            gemm.gemm(x, planes.tensors, entry.ggml_type, Epilogue(out), config)
        assert relative_error(first, want) <= ERROR_LIMITS[torch.float16], config
        assert torch.equal(first, second), config
        assert not counters(device).any(), config


@pytest.mark.gpu
def test_a_graph_can_be_replayed() -> None:
    device = torch.device("cuda")
    planes = random_planes(FORMATS[0], 256, 4096, device)
    x = torch.randn((20, 4096), device=device).half()
    out = torch.zeros((20, 256), device=device)
    arguments = (*planes.tensors, FORMATS[0].ggml_type, None, "none", out)
    gemm.plane_gemm(x, *arguments)  # compile outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gemm.plane_gemm(x, *arguments)
    for seed in range(3):
        x.copy_(torch.randn((20, 4096), generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        want = torch.zeros_like(out)
        gemm.plane_gemm_reference(x, *planes.tensors, FORMATS[0].ggml_type, None, "none", want)
        assert relative_error(out, want) <= ERROR_LIMITS[torch.float16]
