"""The benchmarks' pure parts, and a whole run of a tiny model on the CPU."""

import json
import os
import re
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from squall.bench import peers, run, startup, suite
from squall.bench.cases import CASES, case_config, weight_shapes
from squall.bench.kernels import measure as measure_kernels
from squall.bench.kernels import table as kernels_table
from squall.bench.machine import (
    Ceilings,
    decode_floor_s,
    matmul_weights,
    prefill_floor_s,
    streamed_bytes,
    visible_pairs,
    visible_tokens,
)
from squall.bench.measure import Load
from squall.bench.problems import Found
from squall.bench.random_weights import RECIPES, STD, matrix_type, more_bits, random_blocks
from squall.bench.random_weights import Place as LayerPlace
from squall.bench.subject import DENSE, Spec, random_model
from squall.kernels.quant.base import gguf_formats
from squall.kernels.tuning import Problem
from squall.models.batch import KVCache
from squall.models.config import DecoderConfig, LayerConfig, RopeConfig
from squall.runtime.options import EngineOptions

CPU = torch.device("cpu")
TINY = DecoderConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position=256,
    norm_eps=1e-5,
    layers=(LayerConfig(), LayerConfig(window=8)),
    ropes=(RopeConfig(16),),
    tie_embeddings=True,
    attention_scale=0.25,
)

# Parameters as the model cards give them, in millions; norms and biases are below the tolerance.
PARAMETERS = {
    "deepseek-v2-lite": 15706.5,
    "gemma-2-2b": 2614.3,
    "gemma-2-9b": 9241.7,
    "gemma-3-270m": 268.1,
    "gemma-3-1b": 999.9,
    "llama-3.2-1b": 1235.8,
    "llama-3.2-3b": 3212.7,
    "llama-3.1-8b": 8030.3,
    "mistral-7b": 7248.0,
    "mixtral-8x7b": 46702.8,
    "phi-3.5-mini": 3821.1,
    "qwen2.5-0.5b": 494.0,
    "qwen2.5-7b": 7615.6,
    "qwen3-0.6b": 596.0,
    "qwen3-8b": 8190.7,
    "qwen3-30b-a3b": 30532.1,
    "smollm2-135m": 134.5,
    "smollm2-1.7b": 1711.4,
}


def matrices(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """Hugging Face name to (out, in) of every matrix."""
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    found = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    if not config.tie_embeddings:
        found["lm_head.weight"] = (config.vocab_size, hidden)
    for i, layer in enumerate(config.layers):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        if (mla := config.mla) is not None:
            latent = mla.kv_lora_rank + mla.qk_rope_head_dim
            keys = config.num_heads * (mla.qk_nope_head_dim + mla.v_head_dim)
            found[f"{attention}.q_proj.weight"] = (q, hidden)
            found[f"{attention}.kv_a_proj_with_mqa.weight"] = (latent, hidden)
            found[f"{attention}.kv_b_proj.weight"] = (keys, mla.kv_lora_rank)
        elif config.fused_qkv:
            found[f"{attention}.qkv_proj.weight"] = (q + 2 * kv, hidden)
            found[f"{mlp}.gate_up_proj.weight"] = (2 * inner, hidden)
        else:
            found |= {f"{attention}.{n}_proj.weight": (kv, hidden) for n in "kv"}
            found[f"{attention}.q_proj.weight"] = (q, hidden)
        found[f"{attention}.o_proj.weight"] = (hidden, config.num_heads * config.value_dim)
        if layer.experts:
            assert config.moe is not None
            size, experts = config.moe.intermediate_size, range(config.moe.experts)
            found[f"{mlp}.gate.weight"] = (config.moe.experts, hidden)
            found |= {f"{mlp}.experts.{e}.up_proj.weight": (2 * size, hidden) for e in experts}
            found |= {f"{mlp}.experts.{e}.down_proj.weight": (hidden, size) for e in experts}
            found[f"{mlp}.shared.up_proj.weight"] = (2 * config.moe.shared_size, hidden)
            found[f"{mlp}.shared.down_proj.weight"] = (hidden, config.moe.shared_size)
            continue
        if not config.fused_gate_up:
            found |= {f"{mlp}.{n}_proj.weight": (inner, hidden) for n in ("gate", "up")}
        found[f"{mlp}.down_proj.weight"] = (hidden, inner)
    return found


@pytest.mark.parametrize("name", CASES)
def test_cases_have_the_published_number_of_parameters(name: str) -> None:
    count = sum(rows * columns for rows, columns in matrices(case_config(name)).values())
    assert count / 1e6 == pytest.approx(PARAMETERS[name], rel=1.5e-3)


def test_an_unknown_case_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'llama-9'; known: deepseek-v2-lite, "):
        case_config("llama-9")


def test_weight_shapes_are_those_of_merged_projections() -> None:
    config = case_config("llama-3.1-8b")
    dense = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)]
    assert weight_shapes(config, split_values=False) == dense
    apart = [(5120, 4096), (1024, 4096)]
    assert weight_shapes(config, split_values=True) == [dense[0], *apart, *dense[1:]]


def test_weight_shapes_of_latent_attention() -> None:
    """Without the matrix from latents to keys and values, which is no product of a step's rows."""
    shapes = weight_shapes(case_config("deepseek-v2-lite"), split_values=True)
    assert shapes[:2] == [(16 * 192 + 512 + 64, 2048), (2048, 16 * 128)]
    assert all(columns != 512 for _, columns in shapes)


def test_the_cache_of_latent_attention_is_one_latent_a_token() -> None:
    config = case_config("deepseek-v2-lite")
    assert config.kv_bytes_per_token(2) == 27 * (512 + 64) * 2
    cache = KVCache.allocate(2, 3, 16, config.kv_shape, torch.bfloat16, torch.device("cpu"))
    assert [tuple(keys.shape) for keys in cache.keys] == [(3, 16, 1, 576)] * 2
    assert cache.nbytes == 2 * 3 * 16 * 576 * 2


def test_q4_k_m_gives_more_bits_to_half_of_the_layers() -> None:
    layers = [i for i in range(32) if more_bits(LayerPlace(i, 32, 4))]
    assert layers == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]


# Bytes of published GGUF files, which also hold a tokenizer and float32 norms: some megabytes.
@pytest.mark.parametrize(
    ("case", "recipe", "gigabytes"),
    [
        ("llama-3.1-8b", "q4_k_m", 4.921),
        ("llama-3.1-8b", "q8_0", 8.541),
        ("llama-3.2-1b", "q4_k_m", 0.808),
        ("qwen2.5-7b", "q4_k_m", 4.683),
        ("phi-3.5-mini", "q4_k_m", 2.393),
    ],
)
def test_recipes_give_the_size_of_published_files(case: str, recipe: str, gigabytes: float) -> None:
    config = case_config(case)
    by_name = {entry.name: entry for entry in gguf_formats().values()}
    total = 0
    for name, (rows, columns) in matrices(config).items():
        chosen = matrix_type(recipe, name, columns, config)
        assert chosen is not None
        total += rows * by_name[chosen].row_bytes(columns)
    assert gigabytes - 0.012 < total / 1e9 < gigabytes


@pytest.mark.parametrize(
    ("recipe", "name", "columns", "expected"),
    [
        ("q4_k_m", "model.embed_tokens.weight", 4096, "Q4_K"),
        ("q4_k_m", "lm_head.weight", 4096, "Q6_K"),
        ("q4_k_m", "model.layers.4.self_attn.v_proj.weight", 4096, "Q4_K"),
        ("q4_k_m", "model.layers.6.mlp.down_proj.weight", 4096, "Q6_K"),
        ("q4_k_m", "model.layers.6.mlp.down_proj.weight", 576, "Q8_0"),
        ("q4_k_m", "model.layers.5.mlp.down_proj.weight", 576, "Q5_0"),
        ("q4_k_m", "model.layers.5.mlp.down_proj.weight", 100, None),
        ("q8_0", "lm_head.weight", 4096, "Q8_0"),
        ("q4_0", "lm_head.weight", 4096, "Q6_K"),
        ("q4_0", "lm_head.weight", 576, "Q8_0"),
        ("q4_0", "lm_head.weight", 100, None),
        ("q2_k", "model.layers.9.self_attn.v_proj.weight", 4096, "Q4_K"),
        ("q2_k", "model.layers.9.self_attn.o_proj.weight", 4096, "Q3_K"),
        ("q3_k_m", "model.layers.1.self_attn.v_proj.weight", 4096, "Q5_K"),
        ("q3_k_m", "model.layers.2.mlp.down_proj.weight", 4096, "Q4_K"),
        ("q4_k_s", "model.layers.3.self_attn.v_proj.weight", 4096, "Q5_K"),
        ("q4_k_s", "model.layers.4.mlp.gate_proj.weight", 4096, "Q4_K"),
    ],
)
def test_recipes_by_matrix(recipe: str, name: str, columns: int, expected: str | None) -> None:
    assert matrix_type(recipe, name, columns, case_config("llama-3.1-8b")) == expected


def test_a_tied_embedding_has_the_heads_type() -> None:
    config = case_config("llama-3.2-1b")
    assert matrix_type("q4_k_m", "model.embed_tokens.weight", 2048, config) == "Q6_K"


def test_an_unknown_recipe_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'q9'; known: q4_0, "):
        matrix_type("q9", "lm_head.weight", 4096, case_config("llama-3.1-8b"))


@pytest.mark.parametrize("name", sorted({recipe.base for recipe in RECIPES.values()}))
def test_random_blocks_look_like_weights(name: str) -> None:
    entry = next(e for e in gguf_formats().values() if e.name == name)
    weights = entry.dequantize(random_blocks(entry, 64, 512, torch.Generator().manual_seed(1)))
    assert weights.shape == (64, 512)
    assert float(weights.std()) == pytest.approx(STD, rel=0.1)
    assert abs(float(weights.mean())) < STD / 8  # 4 signed bits reach from -8 to 7


def test_a_window_limits_what_a_layer_sees() -> None:
    assert visible_tokens(TINY, 5) == [5, 5]
    assert visible_tokens(TINY, 50) == [50, 8]
    chunked = replace(TINY, layers=(LayerConfig(-8), LayerConfig(-50)))
    assert visible_tokens(chunked, 16) == [8, 16]
    assert visible_tokens(chunked, 17) == [1, 17]


@pytest.mark.parametrize("window", [0, 1, 7, 40, -1, -7, -20, -40])
def test_pairs_of_a_prompt_are_those_of_its_tokens(window: int) -> None:
    config = replace(TINY, layers=(LayerConfig(window),))
    seen = sum(visible_tokens(config, context)[0] for context in range(1, 41))
    assert seen == visible_pairs(40, window)


def tiny_spec(**options: Any) -> Spec:
    return Spec(case="tiny", quant=DENSE, options=EngineOptions(device="cpu", **options))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> DecoderConfig:
    monkeypatch.setattr("squall.bench.subject.case_config", lambda name: TINY)
    return TINY


def test_floors(tiny: DecoderConfig) -> None:
    model = random_model(tiny_spec(), CPU)
    layer = 64 * (2 * 64 + 2 * 32 + 3 * 96)
    assert matmul_weights(tiny) == 2 * layer + 96 * 64
    assert streamed_bytes(model, 1) == 4 * matmul_weights(tiny)
    slow_memory = Ceilings(1e3, 2e3, 1e12)
    kv = 4 * (50 + 8) * 2 * 2 * 16 * 4  # batch, tokens, k and v, heads, elements, bytes
    expected = (streamed_bytes(model, 4) + kv) / 2e3
    assert decode_floor_s(model, 4, 50, slow_memory) == pytest.approx(expected)
    slow_math = Ceilings(1e12, 1e12, 1e6)
    expected = 2 * 4 * matmul_weights(tiny) / 1e6
    assert decode_floor_s(model, 4, 50, slow_math) == pytest.approx(expected)
    pairs = sum(min(i + 1, 20) + min(i + 1, 8) for i in range(20))
    flops = 2 * 20 * 2 * layer + 2 * 96 * 64 + 4 * pairs * 64
    assert prefill_floor_s(model, 20, slow_math) == pytest.approx(flops / 1e6)


def test_an_embedding_of_its_own_is_not_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    untied = replace(TINY, tie_embeddings=False)
    monkeypatch.setattr("squall.bench.subject.case_config", lambda name: untied)
    model = random_model(tiny_spec(), CPU)
    assert model.nbytes - streamed_bytes(model, 1) == 4 * 96 * 64


def test_peers_by_case_and_size() -> None:
    case = "llama-3.1-8b-bf16"
    assert peers.rate(case, "decode", 8, 128) == {"vllm": 1201.0}
    assert peers.rate(case, "decode", 9, 128) == {}
    assert peers.rate(case, "decode", 8, 16384) == {}
    assert peers.rate(case, "prefill", 1, 8192) == {"vllm": 39428.0}
    assert peers.rate("no such case", "decode", 1, 128) == peers.rate(None, "decode", 1, 128) == {}
    assert peers.figure(case, "startup_s") == {"vllm": 74.0}
    assert peers.figure(case, "offline_512x(512+128)_out_tok_s") == {"vllm": 6517.0}
    demo = peers.rate("smollm2-135m-instruct q4_1", "prefill", 1, 512)
    assert demo == {"llama.cpp": 315.0, "mistral.rs 0.9.5": 25.0}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--batch", "1,x"], "'1,x' is neither a list like 1,8,32 nor none"),
        (["--prefill", "0"], "'0': numbers must be at least 1"),
        (["--repeats", "1,2"], "'1,2' is not a number of at least 1"),
        (["--offline", "512"], "'512' is not REQUESTSxPROMPT+OUTPUT"),
        (["--offline", "4x0+1"], "'4x0+1' is not REQUESTSxPROMPT+OUTPUT"),
        (["--case", "llama-9"], "invalid choice: 'llama-9'"),
        (["--case", "mistral-7b", "-m", "x"], "--case makes its own weights"),
        (["--quant", "q4_0"], "--quant needs a --case"),
    ],
)
def test_bad_options_end_with_code_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run.parse(argv)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_options_make_room_for_all_that_is_measured() -> None:
    argv = ["--device", "cpu", "--batch", "1,12", "--prefill", "none", "--long", "4000"]
    args = run.parse([*argv, "--offline", "700x512+128"])
    assert args.offline == Load(700, 512, 128)
    options = run.make_options(args)
    assert options.max_seqs == run.OFFLINE_SEQS
    assert options.max_queue == 700
    assert options.pa_ctxt_len == 256 * (640 + 32)
    assert run.make_options(run.parse(["--device", "cpu", "--max-seqs", "3"])).max_seqs == 3


def test_a_run_from_weights_to_json(
    tiny: DecoderConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result, profile = tmp_path / "result.json", tmp_path / "profile.txt"
    argv = ["--case", "smollm2-135m", "--quant", "q4_1", "--device", "cpu"]
    argv += ["--batch", "1,2", "--prefill", "8", "--prompt-len", "8", "--output-len", "24"]
    argv += ["--repeats", "2", "--long", "64", "--offline", "3x8+2"]
    assert run.main([*argv, "--json", str(result), "--profile", str(profile)]) == 0
    data = json.loads(result.read_text())
    kinds = [(row["what"], row["batch"], row["prompt"]) for row in data["rows"]]
    assert kinds == [
        ("prefill", 1, 8),
        ("decode", 1, 8),
        ("decode", 2, 8),
        ("decode", 1, 64),
        ("offline", 3, 8),
    ]
    assert all(row["tok_s"] > 0 and row["floor_tok_s"] > 0 for row in data["rows"])
    ratio = data["rows"][3]["tok_s"] / data["rows"][1]["tok_s"]
    assert data["long_ratio"] == pytest.approx(ratio)
    assert data["format"] == "q4_1"
    assert data["graphs"] is False
    assert set(data["load_s"]) == {"weights", "engine"}
    assert {"device", "torch", "triton", "date", "commit", "dtype"} <= set(data)
    tables = profile.read_text()
    assert re.search(r"^8 decode steps, batch 1, context 8: [\d.]+ ms", tables)
    assert "prefill of 8 tokens" in tables
    assert "squall::paged_attention" in tables
    assert "of floor" in capsys.readouterr().out


def test_a_load_that_cannot_run_is_one_line(
    tiny: DecoderConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--case", "smollm2-135m", "--device", "cpu", "--batch", "none", "--prefill", "8,9999"]
    assert run.main(argv) == 1
    captured = capsys.readouterr()
    assert "prefill" in captured.out  # the row that could be measured
    assert captured.err.splitlines()[-1].startswith("bench: ")


def test_a_start_is_told_phase_by_phase(tiny: DecoderConfig) -> None:
    seconds = startup._child(tiny_spec(max_seqs=2, pa_ctxt_len=512), time.time())
    assert list(seconds) == ["import", "weights", "engine", "first token", "total"]
    assert seconds["total"] > seconds["first token"] > 0


def test_start_ups_share_caches_that_were_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def child(command: list[str], env: dict[str, str], **_: Any) -> Any:
        folder = Path(env["TRITON_CACHE_DIR"])
        seen.append((folder, folder.exists()))
        folder.mkdir(exist_ok=True)
        assert env["PATH"] == os.environ["PATH"]
        return subprocess.CompletedProcess(command, 0, 'noise\n{"import": 1.5, "total": 2.5}\n')

    monkeypatch.setattr(subprocess, "run", child)
    rows = startup.measure_startup(tiny_spec())
    assert rows == [{"state": s, "import": 1.5, "total": 2.5} for s in ("cold", "warm")]
    assert [existed for _, existed in seen] == [False, True]
    assert seen[0][0] == seen[1][0]
    assert not seen[0][0].exists()


def test_kernels_without_a_table_run_their_first_candidate() -> None:
    def problem(key: str) -> Found:
        return Found("gemv", Problem(key, 3_000_000, lambda device: print, [{"warps": 4}, {}]))

    def timer(problem: Problem, configs: Any) -> list[float | str]:
        assert configs == [{"warps": 4}]
        return [2e-6] if problem.key == "a" else ["OutOfResources: shared memory"]

    timings = measure_kernels([problem("a"), problem("b")], timer, CPU)
    lines = kernels_table(timings, copy=3e12).splitlines()
    assert re.fullmatch(r"gemv/a +2\.00 +1\.50 +50%  warps=4  \(first candidate\)", lines[1])
    refused = "cannot run with warps=4  (first candidate): OutOfResources: shared memory"
    assert lines[2].endswith(refused)


def test_every_recipe_builds_a_model_on_the_cpu(tiny: DecoderConfig) -> None:
    for recipe in RECIPES:
        spec = Spec(case="tiny", quant=recipe, options=EngineOptions(device="cpu"))
        assert random_model(spec, CPU).nbytes > 0


def test_the_suite_runs_what_is_missing_and_keeps_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "RUNS", {"smollm2-135m q4_1": "--batch 1", "smollm2-135m": "none"})
    monkeypatch.setattr(suite, "describe", lambda device: {"commit": "c1"})
    out = tmp_path / "all.json"
    there = {"commit": "c1", "rows": []}
    out.write_text(json.dumps({"runs": {"smollm2-135m": there}}))
    commands = []

    def fake(command: list[str], timeout: float, check: bool) -> SimpleNamespace:
        commands.append(command)
        Path(command[-1]).write_text(json.dumps({"commit": "c1", "rows": [1]}))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(suite.subprocess, "run", fake)
    assert suite.run_suite(out, "cpu", 100.0) == 0
    (command,) = commands
    assert command[2:6] == ["--case", "smollm2-135m", "--quant", "q4_1"]
    runs = json.loads(out.read_text())["runs"]
    assert runs == {"smollm2-135m": there, "smollm2-135m q4_1": {"commit": "c1", "rows": [1]}}
    assert suite.run_suite(out, "cpu", 100.0) == 0
    assert len(commands) == 1
    assert suite.pending(runs, "c2") == ["smollm2-135m q4_1", "smollm2-135m"]
