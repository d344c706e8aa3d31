"""Every launcher on a GPU against the reference on the CPU: ``pytest -m gpu tests/kernels``."""

from contextlib import AbstractContextManager

import pytest
import torch

from squall.kernels.attention.mla_decode import build_decode, mla_decode
from squall.kernels.attention.paged import build_batch, paged_attention
from squall.kernels.attention.prompt import prefill_attention
from squall.kernels.cases import ERROR_LIMITS, Case, all_cases, relative_error, results

pytestmark = pytest.mark.gpu
PROMPTS = [case for case in all_cases() if case.op is prefill_attention]
CPU = torch.device("cpu")
ROWS = [
    pytest.param(case, dtype, id=f"{case.name}-{str(dtype).removeprefix('torch.')}")
    for case in all_cases()
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
]


@pytest.mark.parametrize(("case", "dtype"), ROWS)
def test_gpu_matches_reference(
    case: Case,
    dtype: torch.dtype,
    poisoned: AbstractContextManager[None],
    check_results,
) -> None:
    want = results(case, case.reference, case.build(dtype, CPU))
    args = case.build(dtype, torch.device("cuda"))
    with poisoned:
        got = results(case, case.op, args)
    torch.cuda.synchronize()
    assert all(t.is_cuda for t in got)
    check_results(case, got, want, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", PROMPTS, ids=lambda case: case.name)
def test_prompts_without_poison(case: Case, dtype: torch.dtype, check_results) -> None:
    """Poisoning needs torch's deterministic mode, in which long prompts do not go to cuDNN."""
    want = results(case, case.reference, case.build(dtype, CPU))
    check_results(case, results(case, case.op, case.build(dtype, torch.device("cuda"))), want)


@pytest.mark.parametrize("batch", [1, 40])
def test_one_graph_serves_any_context_length(batch: int) -> None:
    """A decode captured at context 1 is replayed with other lengths written into its buffers."""
    device, dtype = torch.device("cuda"), torch.bfloat16
    longest = tuple((1, 2000 - 7 * i) for i in range(batch))
    args = list(build_batch(longest, (8, 2, 128), 32, (0, 0.0), dtype, device))
    context_lens = args[5]
    lengths = context_lens.clone()
    context_lens.fill_(1)
    paged_attention(*args)  # compile outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_attention(*args)
    for divisor in (1, 3, 50, 2000):
        context_lens.copy_((lengths // divisor).clamp_min(1))
        out.fill_(float("nan"))
        graph.replay()
        want = paged_attention(*[a.cpu() if isinstance(a, torch.Tensor) else a for a in args])
        assert relative_error(out, want) <= ERROR_LIMITS[dtype]


@pytest.mark.parametrize("batch", [1, 3, 40])
def test_one_graph_of_latent_attention_serves_any_context_length(batch: int) -> None:
    device, dtype = torch.device("cuda"), torch.bfloat16
    longest = tuple((1, 2000 - 7 * i) for i in range(batch))
    args = build_decode(longest, 16, (512, 128, 64, 128), 32, dtype, device)
    context_lens = args[5]
    assert isinstance(context_lens, torch.Tensor)
    lengths = context_lens.clone()
    context_lens.fill_(1)
    mla_decode(*args)  # compile outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = mla_decode(*args)
    for divisor in (1, 3, 50, 2000):
        context_lens.copy_((lengths // divisor).clamp_min(1))
        out.fill_(float("nan"))
        graph.replay()
        want = mla_decode(*[a.cpu() if isinstance(a, torch.Tensor) else a for a in args])
        assert relative_error(out, want) <= ERROR_LIMITS[dtype]
