"""Sorting pairs of token and expert, by one program and by several."""

import pytest
import torch

from squall.kernels.moe.dense import random_routing
from squall.kernels.moe.sort import sort_pairs
from tests.kernels.test_experts import SORTS, check_tiles


@pytest.mark.parametrize(("tokens", "top_k", "experts", "block"), SORTS)
def test_sorting(tokens: int, top_k: int, experts: int, block: int) -> None:
    ids, _ = random_routing(tokens, experts, top_k, torch.device("cpu"))
    check_tiles(sort_pairs(ids, experts, block), ids)
