"""Offline throughput: ``python bench/run.py [-m MODEL] [--batch 1,8] [--json FILE]``.

The method is that of the figures in ``bench/peers.json``: prompts of random token ids, greedy,
EOS ignored. Prefill is one prompt and one new token; decode is the time of N + 1 new tokens less
that of 1, over N. The best of ``--repeats`` counts. The floor is what the machine's measured
memory bandwidth and matrix rate allow.
"""

import argparse
import json
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from squall.bench.machine import (
    Ceilings,
    decode_floor_s,
    describe,
    measure_ceilings,
    prefill_floor_s,
    resident_bytes,
)
from squall.loaders.progress import NoProgress
from squall.runtime.engine import Engine
from squall.runtime.messages import ModelCard
from squall.runtime.options import EngineOptions
from squall.runtime.params import SamplingParams
from squall.runtime.request import EngineRequest
from squall.runtime.startup import build_engine, find_model

PEERS = Path(__file__).with_name("peers.json")


@dataclass(frozen=True)
class Row:
    """One measured figure, tokens per second over the whole batch."""

    what: str  # "prefill" or "decode"
    batch: int
    prompt: int
    tok_s: float
    floor_tok_s: float
    peers: dict[str, float]


def run_batch(engine: Engine, batch: int, prompt: int, new: int, seed: int = 0) -> float:
    """Seconds from the first request to the last token of ``batch`` prompts of random ids."""
    draw = random.Random(seed)
    vocab = engine.model.config.vocab_size
    params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
    requests = [
        EngineRequest(i, [draw.randrange(vocab) for _ in range(prompt)], params, [], [])
        for i in range(batch)
    ]
    begin = time.perf_counter()
    for request in requests:
        failed = engine.add(request)
        if failed is not None:
            raise SystemExit(f"bench: {failed.error}")
    while not engine.idle:
        for event in engine.step():
            if event.error:
                raise SystemExit(f"bench: {event.error}")
    return time.perf_counter() - begin


def measure(
    engine: Engine, card: ModelCard, args: argparse.Namespace, ceilings: Ceilings
) -> list[Row]:
    """All asked-for rows."""
    config = engine.model.config
    rows = []
    run_batch(engine, 1, 16, 4)
    for prompt in args.prefill:
        seconds = min(run_batch(engine, 1, prompt, 1, seed) for seed in range(args.repeats))
        floor = prompt / prefill_floor_s(config, prompt, ceilings)
        peers = _peer_figures(args.peer_case, "prefill", 1, prompt)
        rows.append(Row("prefill", 1, prompt, prompt / seconds, floor, peers))
    for batch in args.batch:
        times = []
        for seed in range(args.repeats):
            first = run_batch(engine, batch, args.prompt_len, 1, seed)
            whole = run_batch(engine, batch, args.prompt_len, args.output_len + 1, seed)
            times.append((whole - first) / args.output_len)
        context = args.prompt_len + args.output_len // 2
        floor_s = decode_floor_s(config, card.weight_bytes, batch, context, ceilings)
        peers = _peer_figures(args.peer_case, "decode", batch, args.prompt_len)
        step = min(times)
        rows.append(Row("decode", batch, args.prompt_len, batch / step, batch / floor_s, peers))
    return rows


def _peer_figures(case: str | None, what: str, batch: int, prompt: int) -> dict[str, float]:
    """The peers' figures for the same work, by engine."""
    if case is None:
        return {}
    data = json.loads(PEERS.read_text())
    engines = data["cases"].get(case) or data["cpu_2_cores_epyc_avx512"].get(case)
    if engines is None:
        known = [*data["cases"], *data["cpu_2_cores_epyc_avx512"]]
        raise SystemExit(f"bench: no peer figures for {case!r}; known: {', '.join(known)}")
    found = {}
    for name, figures in engines.items():
        value = figures.get(f"{what}_tok_s")
        if isinstance(value, dict):
            value = value.get(str(batch if what == "decode" else prompt))
        elif what == "prefill":
            value = figures.get(f"prefill_{prompt}_tok_s", value)
        elif batch != 1:
            value = None
        if value is not None:
            found[name] = float(value)
    return found


def show(rows: list[Row], card: ModelCard) -> None:
    """A table: ours, the best peer, the ratio, the floor, our share of it."""
    table = Table(title=f"{card.name} ({card.format}, {card.device}), tokens per second")
    for column in ("", "batch", "prompt", "squall", "best peer", "ratio", "floor", "of floor"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        name, best = max(row.peers.items(), key=lambda item: item[1], default=("", 0.0))
        table.add_row(
            row.what,
            str(row.batch),
            str(row.prompt),
            f"{row.tok_s:,.1f}",
            f"{name} {best:,.0f}" if best else "-",
            f"{row.tok_s / best:.2f}" if best else "-",
            f"{row.floor_tok_s:,.0f}",
            f"{row.tok_s / row.floor_tok_s:.0%}",
        )
    Console().print(table)


def _numbers(text: str) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list like 1,8,32") from None
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: numbers must be at least 1")
    return values


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/run.py", description=__doc__.split("\n")[0])
    parser.add_argument("-m", "--model", help="model file, folder or hub id (default: demo model)")
    parser.add_argument("-f", "--filename", help="GGUF file inside that folder or repository")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batch", type=_numbers, default=[1, 8], help="decode batch sizes")
    parser.add_argument("--prefill", type=_numbers, default=[512], help="prefill prompt lengths")
    parser.add_argument("--prompt-len", type=int, default=128, help="decode prompt length")
    parser.add_argument("--output-len", type=int, default=128, help="decode new tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer-case", help="row of bench/peers.json to compare with")
    parser.add_argument("--json", type=Path, help="write the result to this file too")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    longest = max([*args.prefill, args.prompt_len + args.output_len]) + 2
    options = EngineOptions(
        model=args.model,
        filename=args.filename,
        device=args.device,
        dtype=args.dtype,
        max_seq_len=longest,
        max_seqs=max(args.batch),
        token_budget=max(2048, *args.batch),
        pa_ctxt_len=max(longest, max(args.batch) * (args.prompt_len + args.output_len + 64)),
    )
    begin = time.perf_counter()
    engine, card = build_engine(find_model(options, NoProgress()), options, NoProgress())
    startup = time.perf_counter() - begin
    ceilings = measure_ceilings(engine.model.device, engine.model.dtype)
    loaded = resident_bytes()
    rows = measure(engine, card, args, ceilings)
    show(rows, card)
    print(
        f"load {startup:.1f} s, weights {card.weight_bytes / 2**20:.0f} MiB, resident "
        f"{loaded / 2**20:.0f} MiB after loading; read {ceilings.read_bytes_s / 1e9:.0f} GB/s, "
        f"matmul {ceilings.matmul_flops_s / 1e12:.2f} TFLOP/s"
    )
    if args.json:
        result = {
            **describe(engine.model.device),
            "model": card.name,
            "format": card.format,
            "load_s": round(startup, 2),
            "resident_bytes": loaded,
            "ceilings": asdict(ceilings),
            "rows": [asdict(row) for row in rows],
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
