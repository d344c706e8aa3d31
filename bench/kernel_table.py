"""Where the time of a step goes, kernel by kernel (torch.profiler)."""

import time
from collections.abc import Callable
from typing import Any

from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from squall.bench.measure import Load, add, drain, make_requests, run_load, step
from squall.kernels.backends.device import backend_of
from squall.runtime.engine import Engine

STEPS = 8
_NAME = 88  # characters


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
    rows = [
        (event.key, event.count, _own_time(event, on_gpu))
        for event in trace.key_averages()
        if not on_gpu or event.device_type == DeviceType.CUDA
    ]
    return _table(title, wall, [row for row in rows if row[2] > 0])


def _own_time(event: Any, on_gpu: bool) -> float:
    return float(event.self_device_time_total if on_gpu else event.self_cpu_time_total)


def _table(title: str, wall: float, rows: list[tuple[str, int, float]]) -> str:
    """``rows``: name, calls, microseconds in all."""
    total = sum(row[2] for row in rows)
    lines = [f"{title}: {wall * 1e3:.3f} ms, {total / 1e3:.3f} ms in kernels"]
    lines.append(f"{'kernel':<{_NAME}} {'calls':>7} {'total us':>11} {'us each':>9} {'share':>6}")
    for name, calls, time_us in sorted(rows, key=lambda row: -row[2]):
        short = name if len(name) <= _NAME else name[: _NAME - 3] + "..."
        lines.append(
            f"{short:<{_NAME}} {calls:>7} {time_us:>11.1f} {time_us / calls:>9.2f} "
            f"{time_us / total:>6.1%}"
        )
    return "\n".join(lines) + "\n"
