"""KV sizing: budgets by precedence, and the message when it cannot fit."""

import re

import pytest

from squall.runtime.memory import GIB, MIB, KVMemoryError, KVPlan, MemoryFacts, OptionError, plan_kv
from squall.runtime.options import EngineOptions

GPU = MemoryFacts("cuda:0", 80 * GIB, 60 * GIB, 16 * GIB, 2 * GIB, lazy=False)
CPU = MemoryFacts("cpu", 16 * GIB, 12 * GIB, GIB, GIB, lazy=True)
TOKEN = 131072  # bytes, Llama-3.1-8B in bf16
MODEL_LEN = 131072


def plan(facts: MemoryFacts = GPU, model_len: int = MODEL_LEN, **options: object) -> KVPlan:
    return plan_kv(EngineOptions(**options), facts, TOKEN * 32, model_len)


def blocks(nbytes: float) -> int:
    return int(nbytes) // (TOKEN * 32)


def test_a_gpu_uses_nine_tenths_by_default() -> None:
    expected = blocks(80 * GIB * 0.9 - 20 * GIB - 2 * GIB)
    assert plan() == KVPlan(expected, MODEL_LEN)


@pytest.mark.parametrize(
    ("options", "budget"),
    [
        ({"pa_gpu_mem_usage": 0.5}, 80 * GIB * 0.5 - 22 * GIB),
        ({"pa_gpu_mem": 1000}, 1000 * MIB),
        ({"pa_ctxt_len": 1001}, 1024 * TOKEN),
        ({"pa_ctxt_len": 64, "pa_gpu_mem_usage": 0.5, "pa_gpu_mem": 99}, 64 * TOKEN),
        ({"pa_gpu_mem_usage": 0.5, "pa_gpu_mem": 99}, 80 * GIB * 0.5 - 22 * GIB),
    ],
)
def test_the_first_given_of_context_usage_memory_counts(
    options: dict[str, float], budget: float
) -> None:
    found = plan(**options)
    assert found.blocks == blocks(budget)
    assert found.max_seq_len == min(MODEL_LEN, found.blocks * 32)


def test_the_context_is_cut_to_what_fits_unless_it_was_asked_for() -> None:
    assert plan(pa_gpu_mem=128).max_seq_len == 1024
    assert plan(pa_gpu_mem=128, max_seq_len=1000).max_seq_len == 1000
    with pytest.raises(KVMemoryError, match=re.escape("(--max-seq-len 1024)")):
        plan(pa_gpu_mem=128, max_seq_len=1025)


def test_a_cpu_gets_all_sequences_but_at_most_4_gib_and_half_of_what_is_free() -> None:
    small = plan(CPU, 1000, max_seqs=2)
    assert small == KVPlan(2 * 32, 1000)
    assert plan(CPU).blocks == blocks(4 * GIB)
    tight = MemoryFacts("cpu", 16 * GIB, 2 * GIB, GIB, GIB, lazy=True)
    assert plan(tight).blocks == blocks(GIB / 2)


def test_the_message_has_all_the_numbers() -> None:
    full = MemoryFacts("cuda:0", 24 * GIB, 6 * GIB, 16 * GIB, 2 * GIB, lazy=False)
    with pytest.raises(KVMemoryError) as error:
        plan(full, max_seq_len=65536)
    message = str(error.value)
    assert "\n" not in message
    numbers = ["24.00 GiB in all", "6.00 GiB free", "16.00 GiB of weights", "2.00 GiB for activ"]
    numbers += ["1.60 GiB allowed", "8.00 GiB needed for 65536 tokens", "13088 tokens"]
    for number in numbers:
        assert number in message


def test_a_context_that_was_asked_for_needs_a_cache_as_large() -> None:
    with pytest.raises(KVMemoryError, match=re.escape("(--max-seq-len 512)")):
        plan(pa_ctxt_len=512, max_seq_len=1024)


# Gemma 3 12B in bf16: 8 layers with full attention, 40 with a window, in groups of 8
HYBRID = (0, *(1024,) * 5)
HYBRID_BLOCK = 8 * 8192 * 32


def hybrid(facts: MemoryFacts = GPU, **options: object) -> KVPlan:
    return plan_kv(EngineOptions(**options), facts, HYBRID_BLOCK, MODEL_LEN, HYBRID)


def test_windows_need_no_more_than_they_see() -> None:
    facts = MemoryFacts("cuda:0", 80 * GIB, 16 * GIB, 54 * GIB, 0, lazy=False)
    room = 16 * GIB // HYBRID_BLOCK
    assert room // 6 * 32 < MODEL_LEN  # tokens in every layer
    assert hybrid(facts, pa_gpu_mem=16 * 1024) == KVPlan(room, MODEL_LEN)
    needed = 5 * (1024 // 32 + 1)
    small = hybrid(facts, pa_gpu_mem=1024)
    assert small.max_seq_len == (small.blocks - needed) * 32
    assert hybrid(facts, pa_gpu_mem=1024, max_seq_len=small.max_seq_len).blocks == small.blocks
    with pytest.raises(KVMemoryError) as error:
        hybrid(facts, pa_gpu_mem=1024, max_seq_len=small.max_seq_len + 1)
    assert f"(--max-seq-len {small.max_seq_len})" in str(error.value)
    assert f"1.00 GiB needed for {small.max_seq_len + 1} tokens" in str(error.value)


def test_a_sequence_shorter_than_the_window_needs_every_group_alike() -> None:
    assert hybrid(pa_ctxt_len=640).blocks == 6 * 20
    assert hybrid(pa_ctxt_len=640).max_seq_len == 640
    assert hybrid(pa_ctxt_len=10_000).blocks == 6 * 313
    assert hybrid(pa_ctxt_len=10_000).max_seq_len == (6 * 313 - 5 * 33) * 32
    with pytest.raises(KVMemoryError, match="not even one block fits"):
        hybrid(MemoryFacts("cuda:0", 24 * GIB, 5 * HYBRID_BLOCK, 20 * GIB, 0, lazy=False))


def test_windows_alone_hold_any_length() -> None:
    windows = (4096,)  # Mistral 7B v0.1 in bf16
    found = plan_kv(EngineOptions(pa_ctxt_len=4128), GPU, TOKEN * 32, MODEL_LEN, windows)
    assert found == KVPlan(129, MODEL_LEN)
    less = plan_kv(EngineOptions(pa_ctxt_len=4096), GPU, TOKEN * 32, MODEL_LEN, windows)
    assert less == KVPlan(128, 4096)


def test_a_cpu_gets_windows_for_all_sequences_and_one_step() -> None:
    facts = MemoryFacts("cpu", 64 * GIB, 60 * GIB, GIB, GIB, lazy=True)
    found = plan_kv(EngineOptions(max_seqs=2), facts, 4096, 10_000, (0, 100))
    assert found == KVPlan(2 * (313 + 5) + 2 * (2048 // 32), 10_000)
    short = plan_kv(EngineOptions(max_seqs=2), facts, 4096, 320, (0, 100))
    assert short == KVPlan(2 * 10 * 2, 320)


@pytest.mark.parametrize("free", [0, GIB, 2 * GIB])
def test_no_room_at_all(free: int) -> None:
    full = MemoryFacts("cuda:0", 24 * GIB, free, 20 * GIB, 2 * GIB, lazy=False)
    with pytest.raises(KVMemoryError, match="not even one block fits"):
        plan(full)


def test_more_than_is_free_is_refused() -> None:
    with pytest.raises(KVMemoryError, match=re.escape("100.00 GiB allowed for KV")):
        plan(pa_gpu_mem=100 * 1024)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_seq_len": 0}, "--max-seq-len is 0, expected at least 1"),
        ({"max_seq_len": MODEL_LEN + 1}, "the model's context length is 131072"),
        ({"max_seqs": 0}, "--max-seqs is 0"),
        ({"pa_gpu_mem": -5}, "--pa-gpu-mem is -5"),
        ({"pa_ctxt_len": 0}, "--pa-ctxt-len is 0"),
        ({"pa_gpu_mem_usage": 1.5}, "--pa-gpu-mem-usage is 1.5, expected above 0 and up to 1"),
        ({"pa_gpu_mem_usage": float("nan")}, "--pa-gpu-mem-usage is nan"),
        ({"pa_blk_size": 24}, "--pa-blk-size is 24, accepted: 8, 16, 32, 64"),
    ],
)
def test_options_out_of_range(options: dict[str, float], message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        plan(**options)
