"""Devices: what a backend file states, and the choice of one by name.

Every other file in this folder describes one kind of device in a constant ``BACKEND``; files are
found by name, so a new device is a new file.
"""

import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from squall.kernels import backends

AUTO = "auto"


class DeviceError(Exception):
    """A device that was asked for cannot be used; the message is one line."""


@dataclass(frozen=True)
class Backend:
    """Facts about one kind of device.

    ``available()`` is None when it can be used, else the reason in one line; the other functions
    may be called only then. ``memory`` gives (free, total) bytes, free being what this process
    can still take. ``prepare()`` is called before a model is put on the device: what must be built
    first, is built then. ``overrides`` maps operator names to implementations for ``dispatch_key``.
    """

    type: str  # torch's name, "cuda"
    dispatch_key: str  # torch's dispatch key, "CUDA"
    rank: int  # "auto" takes the available backend of the lowest rank
    available: Callable[[], str | None]
    count: Callable[[], int]
    describe: Callable[[torch.device], str]
    synchronize: Callable[[torch.device], None]
    memory: Callable[[torch.device], tuple[int, int]]
    default_dtype: Callable[[torch.device], torch.dtype]
    prepare: Callable[[], object] = lambda: None
    overrides: Mapping[str, Callable[..., Any]] = field(
        default_factory=lambda: MappingProxyType({})
    )


@functools.cache
def all_backends() -> tuple[Backend, ...]:
    """Every backend of this folder, in the order "auto" tries them."""
    names = (m.name for m in pkgutil.iter_modules(backends.__path__) if m.name != "device")
    modules = (importlib.import_module(f"{backends.__name__}.{name}") for name in sorted(names))
    return tuple(sorted((m.BACKEND for m in modules), key=lambda b: b.rank))


def backend_of(device: torch.device) -> Backend:
    """The facts for a device; ``DeviceError`` for a type without a backend file."""
    for backend in all_backends():
        if backend.type == device.type:
            return backend
    raise DeviceError(f"no backend for device {str(device)!r}; {_accepted()}")


def overrides(name: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    """(dispatch key, implementation) of every backend that overrides operator ``name``."""
    for backend in all_backends():
        if name in backend.overrides:
            yield backend.dispatch_key, backend.overrides[name]


def _accepted() -> str:
    kinds = [AUTO, *(b.type for b in all_backends())]
    return f"accepted: {', '.join(kinds)}, or TYPE:INDEX"


def _usable() -> str:
    found: list[str] = []
    for backend in all_backends():
        if backend.available() is None:
            many = backend.count() > 1
            found += (
                [f"{backend.type}:{i}" for i in range(backend.count())] if many else [backend.type]
            )
    return f"usable here: {', '.join(found)}"


def resolve_device(name: str) -> torch.device:
    """The device that ``name`` asks for: "auto", a type ("cuda"), or type and index ("cuda:1").

    "auto" takes the first of cuda, xpu, mps, cpu that can be used. A type without index means
    index 0. Raises ``DeviceError`` when the name is malformed or the device is not there.
    """
    wanted = name.strip().lower()
    if wanted == AUTO:
        usable = (b for b in all_backends() if b.available() is None)
        return _device(next(usable), 0)
    kind, colon, number = wanted.partition(":")
    backend = next((b for b in all_backends() if b.type == kind), None)
    if backend is None or (colon and not (number.isascii() and number.isdigit())):
        raise DeviceError(f"unknown device {name!r}; {_accepted()}")
    reason = backend.available()
    if reason is not None:
        raise DeviceError(f"device {name!r} is not there: {reason}; {_usable()}")
    index = int(number) if colon else 0
    if index >= backend.count():
        raise DeviceError(f"device {name!r} is not there: no such index; {_usable()}")
    return _device(backend, index)


def _device(backend: Backend, index: int) -> torch.device:
    return (
        torch.device(backend.type) if backend.type == "cpu" else torch.device(backend.type, index)
    )
