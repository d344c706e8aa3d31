"""Models with sliding windows or chunks through the engine, well past them, against transformers:
in a cache that has room for all, and in one that has not by far."""

from pathlib import Path
from typing import Any

import pytest
import torch

from squall.loaders.hub import resolve
from squall.loaders.load import Checkpoint
from squall.loaders.progress import NoProgress
from squall.models.batch import KVCache
from squall.models.decoder import Decoder
from squall.models.kv_layout import kv_layout
from squall.runtime.engine import Engine
from squall.runtime.inputs import DecodeInputs
from squall.runtime.memory import KVMemoryError
from squall.runtime.options import EngineOptions
from squall.runtime.pack import pack
from squall.runtime.pages import blocks_for, blocks_needed
from squall.runtime.params import SamplingParams
from squall.runtime.request import EngineRequest
from squall.runtime.runner import Launched, Runner
from squall.runtime.sample_plan import SampleRow
from squall.runtime.scheduler import Chunk, Limits
from squall.runtime.startup import start_engine
from tests.e2e.test_golden_logits import LLAMA4, SIZES, save_random

CPU = torch.device("cpu")
LENGTH = 130
BLOCK = 8
NEW = 40
PROMPTS = [
    [(11 * i + 5 * j) % SIZES["vocab_size"] for j in range(n)]
    for i, n in enumerate((2, 61, 17, 90, 35, 8))
]
LONGEST = max(map(len, PROMPTS)) + NEW - 1  # tokens that are cached
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": (
        "Gemma3Text",
        {"head_dim": 16, "sliding_window": 20, "num_hidden_layers": 7, "query_pre_attn_scalar": 24},
    ),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 9, "num_hidden_layers": 4}),
    "mistral": ("Mistral", {"sliding_window": 21, "head_dim": 16}),
    # chunks that end within blocks, and chunks of whole blocks
    "llama4": ("Llama4Text", LLAMA4 | {"attention_chunk_size": 20}),
    "llama4-blocks": ("Llama4Text", LLAMA4 | {"attention_chunk_size": 24}),
}


class Subject:
    """A tiny random model, and its continuations of the prompts, which transformers confirms."""

    def __init__(self, name: str, folder: Path) -> None:
        family, overrides = FAMILIES[name]
        reference = save_random(folder, family, overrides | {"max_position_embeddings": LENGTH})
        checkpoint = Checkpoint(resolve(str(folder)))
        self.model = checkpoint.decoder(CPU, torch.float32, LENGTH, NoProgress())
        engine = make_engine(self.model, 2000, 512, 8)
        self.expected = run(engine)
        assert engine.state.preemptions == 0
        for prompt, output in zip(PROMPTS, self.expected, strict=True):
            ids = torch.tensor([prompt + output])
            with torch.no_grad():
                best = reference(ids).logits[0].argmax(-1)
            assert best[len(prompt) - 1 : -1].tolist() == output


@pytest.fixture(scope="module", params=FAMILIES)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject(request.param, tmp_path_factory.mktemp(request.param))


def make_engine(model: Decoder, blocks: int, budget: int, seqs: int) -> Engine:
    """An engine whose cache shows what is read without having been written."""
    layout = kv_layout(model.config, LENGTH)
    shape = model.config.kv_shape
    layers = layout.group_layers
    cache = KVCache.allocate(layers, blocks, BLOCK, shape, torch.float32, model.device)
    for tensor in cache.keys + cache.values:
        tensor.fill_(float("nan"))
    limits = Limits(seqs, budget, BLOCK, 100, LENGTH, layout.windows)
    return Engine(model, cache.shared(layout.groups, layout.places), limits)


def run(engine: Engine) -> list[list[int]]:
    """The continuations of all prompts; every freed block is filled with NaN."""
    found: list[list[int]] = [[] for _ in PROMPTS]
    for i, prompt in enumerate(PROMPTS):
        params = SamplingParams(temperature=0.0, max_tokens=NEW)
        assert engine.add(EngineRequest(i, prompt, params, [], [])) is None
    while not engine.idle:
        for event in engine.step():
            assert event.error is None
            found[event.id] += event.token_ids
        free = torch.tensor(engine.state.pool._free, dtype=torch.int64)
        for tensor in engine.cache.keys + engine.cache.values:
            tensor[free] = float("nan")
    assert engine.state.pool.used_blocks == 0
    return found


@pytest.mark.parametrize("budget", [8, 512])
def test_with_room_for_the_windows_of_one_sequence(subject: Subject, budget: int) -> None:
    layout = kv_layout(subject.model.config, LENGTH)
    blocks = blocks_needed(LONGEST, BLOCK, layout.windows) + 4
    # not even one sequence would fit with all its tokens in all layers
    assert blocks < blocks_for(LONGEST, BLOCK) * len(layout.windows)
    assert run(make_engine(subject.model, blocks, budget, 8)) == subject.expected


def test_preempted(subject: Subject) -> None:
    layout = kv_layout(subject.model.config, LENGTH)
    blocks = sum(blocks_needed(n, BLOCK, layout.windows) for n in (LENGTH, 40))
    engine = make_engine(subject.model, blocks, 64, 8)
    assert run(engine) == subject.expected
    assert (engine.state.preemptions > 0) == (0 in layout.windows)


def test_memory_is_planned_for_the_windows(subject: Subject) -> None:
    layout = kv_layout(subject.model.config, LENGTH)
    room = blocks_needed(LENGTH, BLOCK, layout.windows)
    tokens = -(-room // len(layout.windows)) * BLOCK  # in every layer; less than a sequence
    assert tokens < LENGTH
    options = EngineOptions(max_seq_len=LENGTH, pa_blk_size=BLOCK, pa_ctxt_len=tokens)
    engine, plan, _ = start_engine(subject.model, options, NoProgress())
    assert plan.max_seq_len == LENGTH
    per_layer = subject.model.config.kv_bytes_per_token(4) // subject.model.config.num_layers
    assert engine.cache.nbytes == plan.blocks * BLOCK * per_layer * layout.group_layers
    assert run(engine) == subject.expected
    less = EngineOptions(max_seq_len=LENGTH, pa_blk_size=BLOCK, pa_ctxt_len=tokens - BLOCK)
    with pytest.raises(KVMemoryError, match=f"needed for {LENGTH} tokens"):
        start_engine(subject.model, less, NoProgress())


def test_static_inputs_give_what_packed_batches_give(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decode step that CUDA graphs capture, run on the CPU beside the engine's own."""
    layout = kv_layout(subject.model.config, LENGTH)
    blocks = sum(blocks_needed(n, BLOCK, layout.windows) for n in (LENGTH, 40))
    engine = make_engine(subject.model, blocks, 64, 8)
    inputs = DecodeInputs(8, len(layout.windows), blocks_for(LENGTH, BLOCK), BLOCK, CPU)
    engine.runner._inputs = inputs
    compared = 0

    def launch(runner: Runner, chunks: tuple[Chunk, ...], rows: list[SampleRow]) -> Launched:
        nonlocal compared
        if all(chunk.length == 1 and chunk.samples for chunk in chunks):
            order = inputs.arrange([chunk.seq for chunk in chunks])
            chunks, rows = tuple(chunks[i] for i in order), [rows[i] for i in order]
            inputs.fill(chunks, rows, 8)
            with torch.inference_mode():
                found = runner._decode(8)[: len(chunks)]
                expected = subject.model(pack(chunks, BLOCK, runner._sampled), runner.cache)
            torch.testing.assert_close(found, expected)
            compared += 1
        return plain(runner, chunks, rows)

    plain = Runner.launch
    monkeypatch.setattr(Runner, "launch", launch)
    assert run(engine) == subject.expected
    assert compared > NEW
