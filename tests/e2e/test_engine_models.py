"""Models whose decode steps differ from Llama's, in the engine: the texts of sequences computed
together are those of each recomputed alone."""

from pathlib import Path

import pytest
import torch

from squall.loaders.progress import NoProgress
from squall.models.batch import KVCache
from squall.runtime.engine import Engine
from squall.runtime.options import EngineOptions
from squall.runtime.scheduler import Limits
from squall.runtime.startup import _probe_activations
from tests.e2e.test_engine import BLOCK, PROMPTS, greedy, request, run
from tests.e2e.test_golden_logits import CASES, load, save_random

LENGTH = 40  # tokens the tables are built for
MODELS = (
    "gemma3n",
    "hunyuan",
    "cohere-qk-norm",
    "ministral3",
    "deepseek_v2",
    "deepseek_v3-experts",
)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("case", MODELS)
def test_texts_do_not_depend_on_company(case: str, device: str, tmp_path: Path) -> None:
    save_random(tmp_path, *CASES[case])
    model = load(tmp_path, device)
    config = model.config
    shape, layers = config.kv_shape, config.num_caches
    cache = KVCache.allocate(layers, 60, BLOCK, shape, torch.float32, model.device)
    for tensor in cache.keys + cache.values:
        tensor.fill_(float("nan"))  # whatever is read without having been written shows
    engine = Engine(model, cache, Limits(4, 16, BLOCK, 100, LENGTH))
    if device == "cuda":
        engine.runner.capture(NoProgress())
    prompts = [prompt[:20] for prompt in PROMPTS]
    found = run(engine, (request(i, prompt, max_tokens=12) for i, prompt in enumerate(prompts)))
    assert [found[i] for i in range(len(prompts))] == [greedy(model, p, 12) for p in prompts]


@pytest.mark.parametrize("case", MODELS)
def test_the_largest_step_can_be_measured(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU does at its start, here with an allocator that counts nothing."""
    save_random(tmp_path, *CASES[case])
    for name in ("memory_allocated", "reset_peak_memory_stats", "max_memory_allocated"):
        monkeypatch.setattr(torch.xpu, name, lambda device: 0)
    monkeypatch.setattr(torch.xpu, "empty_cache", lambda: None)
    options = EngineOptions(device="cpu", max_seqs=3)
    assert _probe_activations(load(tmp_path, "cpu"), LENGTH, options) == 0
