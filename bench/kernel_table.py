"""Where the time of a step goes, kernel by kernel (torch.profiler)."""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from squall.bench.measure import Load, add, drain, make_requests, run_load, step
from squall.kernels.backends.device import backend_of
from squall.runtime.engine import Engine

STEPS = 8
_NAME = 64  # characters


@dataclass
class Row:
    """A kernel (GPU) or an operator (CPU): its calls, and microseconds in all."""

    name: str
    calls: int
    time_us: float
    idle_us: float = 0.0  # before its starts, within ``time_us``
    grid: str = ""


def kernel_tables(engine: Engine, batch: int, context: int, prompt: int) -> str:
    """Tables of ``STEPS`` decode steps of ``batch`` sequences of ``context`` tokens, and of the
    prefill of one prompt of ``prompt`` tokens."""
    requests = make_requests(engine, Load(batch, context, 8 * STEPS), seed=0)
    add(engine, requests)
    waiting = {request.id for request in requests}
    while waiting:
        waiting -= {event.id for event in step(engine)}
    for _ in range(STEPS):
        step(engine)
    title = f"{STEPS} decode steps, batch {batch}, context {context}"
    decode = _profiled(engine, title, lambda: [step(engine) for _ in range(STEPS)])
    for request in requests:
        engine.abort(request.id)
    drain(engine)
    run_load(engine, Load(1, prompt, 1), seed=0)
    add(engine, make_requests(engine, Load(1, prompt, 1), seed=1))
    prefill = _profiled(engine, f"prefill of {prompt} tokens", lambda: drain(engine))
    return f"{decode}\n{prefill}"


def _profiled(engine: Engine, title: str, work: Callable[[], object]) -> str:
    device = engine.model.device
    wait = backend_of(device).synchronize
    on_gpu = device.type == "cuda"
    wait(device)
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as trace:
        begin = time.perf_counter()
        work()
        wait(device)
        wall = time.perf_counter() - begin
    return _table(title, wall, _gpu_rows(trace) if on_gpu else _cpu_rows(trace))


def _cpu_rows(trace: profile) -> list[Row]:
    rows = (Row(e.key, e.count, e.self_cpu_time_total) for e in trace.key_averages())
    return [row for row in rows if row.time_us > 0]


def _gpu_rows(trace: profile) -> list[Row]:
    """Kernels by name and grid. A kernel's time is what it adds to the stream's: from the end of
    the one before, during which it may have started (dependent launch), to its own end."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        events = json.loads(path.read_bytes())["traceEvents"]
    on_device = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    rows: dict[str, Row] = {}
    last = None
    for event in sorted(on_device, key=lambda e: float(e["ts"]) + float(e["dur"])):
        start, end = float(event["ts"]), float(event["ts"]) + float(event["dur"])
        idle = 0.0 if last is None else max(0.0, start - last)
        added = end - (start if last is None else last)
        grid = "x".join(str(n) for n in event["args"].get("grid", ()))
        row = rows.setdefault(f"{event['name']} {grid}", Row(event["name"], 0, 0.0, 0.0, grid))
        row.calls, row.time_us, row.idle_us = row.calls + 1, row.time_us + added, row.idle_us + idle
        last = end
    return list(rows.values())


def _table(title: str, wall: float, rows: list[Row]) -> str:
    total = sum(row.time_us for row in rows)
    lines = [
        f"{title}: {wall * 1e3:.3f} ms, {total / 1e3:.3f} ms from the first kernel to the last"
    ]
    lines.append(
        f"{'kernel':<{_NAME}} {'grid':>12} {'calls':>6} {'total us':>10} {'us each':>8} "
        f"{'idle before':>11} {'share':>6}"
    )
    for row in sorted(rows, key=lambda row: -row.time_us):
        short = row.name if len(row.name) <= _NAME else row.name[: _NAME - 3] + "..."
        lines.append(
            f"{short:<{_NAME}} {row.grid:>12} {row.calls:>6} {row.time_us:>10.1f} "
            f"{row.time_us / row.calls:>8.2f} {row.idle_us / row.calls:>11.2f} "
            f"{row.time_us / total:>6.1%}"
        )
    return "\n".join(lines) + "\n"
