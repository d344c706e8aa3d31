"""The native CPU operators against the references, over every operator's case table."""

import pytest
import torch

from squall.kernels import activation, rmsnorm
from squall.kernels.attention import paged, rope_store
from squall.kernels.attention.paged import paged_attention, paged_attention_reference
from squall.kernels.backends import cpu
from squall.kernels.cases import Case, results

CPU = torch.device("cpu")
CASES = (*activation.CASES, *rmsnorm.CASES, *rope_store.CASES, *paged.CASES)


@pytest.fixture(scope="module", autouse=True)
def native() -> None:
    if cpu._native_ops() is None:
        pytest.fail("the native operators cannot be built here: see squall doctor")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_native_matches_the_reference(case: Case, check_results) -> None:
    want = results(case, case.reference, case.build(torch.float32, CPU))
    got = results(case, case.op, case.build(torch.float32, CPU))
    check_results(case, got, want)


@pytest.mark.parametrize("dim", [16, 64, 80, 128, 256])
@pytest.mark.parametrize(
    ("window", "softcap"), [(0, 0.0), (7, 0.0), (0, 5.0), (9, 3.0), (-8, 0.0), (-30, 3.0)]
)
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_decode_attention(dim: int, window: int, softcap: float, sinks: bool, threads: int) -> None:
    """Scattered blocks, sequences of any length, unused cache poisoned."""
    torch.manual_seed(0)
    contexts = [1, 8, 9, 2000]
    k_cache, v_cache = torch.full((2, 300, 8, 2, dim), float("nan")).unbind()
    order = torch.randperm(300)
    tables = torch.full((len(contexts), 250), -1, dtype=torch.int32)
    for s, context in enumerate(contexts):
        used = -(-context // 8)
        blocks, order = order[:used], order[used:]
        tables[s, :used] = blocks
        for cache in (k_cache, v_cache):
            flat = cache[blocks].reshape(-1, 2, dim)
            flat[:context] = torch.randn(context, 2, dim)
            cache[blocks] = flat.view(used, 8, 2, dim)
    q = torch.randn(len(contexts), 9, dim)[:, :6]
    args = (
        q, k_cache, v_cache, tables, torch.arange(len(contexts) + 1, dtype=torch.int32),
        torch.tensor(contexts, dtype=torch.int32), 1, max(contexts), dim**-0.5, window, softcap,
        torch.randn(6) if sinks else None,
    )  # fmt: skip
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = paged_attention(*args)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(got, paged_attention_reference(*args), rtol=1e-5, atol=1e-5)


def test_activations_keep_to_the_formula_far_out() -> None:
    """exp is a polynomial here: large and tiny gates must neither overflow nor turn to NaN."""
    gate = torch.tensor([[-1e4, -200.0, -88.0, -20.0, -1e-8, 0.0, 1e-8, 20.0, 88.0, 200.0, 1e4]])
    x = torch.cat((gate, torch.ones_like(gate)), dim=1)
    silu, gelu = torch.ops.squall.silu_mul(x), torch.ops.squall.gelu_tanh_mul(x)
    torch.testing.assert_close(silu, torch.nn.functional.silu(gate), rtol=1e-6, atol=1e-30)
    want = torch.nn.functional.gelu(gate, approximate="tanh")
    torch.testing.assert_close(gelu, want, rtol=1e-6, atol=1e-6)
