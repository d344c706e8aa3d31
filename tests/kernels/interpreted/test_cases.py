"""Every launcher in Triton's interpreter against its torch reference."""

from contextlib import AbstractContextManager

import pytest
import torch

from squall.kernels.cases import Case, all_cases, results

# exp(+big) is inf on a GPU without a word; numpy, which the interpreter runs on, warns.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

CPU = torch.device("cpu")
# No bf16: the interpreter's tl.dot silently gives garbage for it (checked on Triton 3.7.1).
# f16 is a rounding of the same arithmetic, so it runs where a variant is compiled for f16 too.
ROWS = [
    pytest.param(case, dtype, id=f"{case.name}-{str(dtype).removeprefix('torch.')}")
    for case in all_cases()
    if case.interpret
    for dtype in (torch.float32, torch.float16)
    if dtype == torch.float32 or case.aot
]


@pytest.mark.parametrize(("case", "dtype"), ROWS)
def test_interpreter_matches_reference(
    case: Case,
    dtype: torch.dtype,
    poisoned: AbstractContextManager[None],
    check_results,
) -> None:
    want = results(case, case.reference, case.build(dtype, CPU))
    args = case.build(dtype, CPU)
    with poisoned:
        got = results(case, case.launcher, args)
    check_results(case, got, want, dtype)
