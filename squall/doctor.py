"""``squall doctor``: what this machine has, what it lacks, and the command that mends it."""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

from squall import __version__

HUB_SECONDS = 3.0
COMMAND_SECONDS = 10.0
SPACE_WARNING = 5e9  # bytes free below which a download is likely to fail
GIB = 2**30
PIP = "python -m pip install"


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``mend`` is the command or step that helps."""

    state: Literal["ok", "warn", "fail"]
    name: str
    text: str
    mend: str | None = None


def doctor() -> int:
    """Print the report; 1 if something that is needed is missing, else 0."""
    marks = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}
    failed = False
    for check in CHECKS:
        for finding in check():
            failed |= finding.state == "fail"
            print(f"{marks[finding.state]}  {finding.name:<12} {finding.text}", flush=True)
            if finding.mend:
                print(f"{'':6}{'':<12} -> {finding.mend}", flush=True)
    print("Something that Squall needs is missing; see FAIL above." if failed else "Ready.")
    return int(failed)


def check_python() -> Iterator[Finding]:
    """Interpreter and system."""
    system = f"{platform.system()} {platform.machine()}"
    yield Finding("ok", "Python", f"{platform.python_version()}, {system}")
    yield Finding("ok", "squall", __version__)


def requirements() -> list[tuple[str, str]]:
    """(name, version range) of what Squall needs on this system, extras left out."""
    found: list[tuple[str, str]] = []
    for line in importlib.metadata.requires("squall") or []:
        need, _, marker = (part.strip() for part in line.partition(";"))
        if "extra ==" in marker:
            continue
        system = re.search(r"platform_system\s*(==|!=)\s*['\"](\w+)['\"]", marker)
        if system and (system[2] == platform.system()) != (system[1] == "=="):
            continue
        match = re.match(r"([A-Za-z0-9._-]+)\s*(.*)", need)
        assert match, line
        found.append((match[1], match[2]))
    return found


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def in_range(version: str, wanted: str) -> bool:
    """Whether ``version`` satisfies a range such as ``>=2.8,<2.14`` (numbers only)."""
    for condition in filter(None, wanted.split(",")):
        match = re.fullmatch(r"\s*(>=|<|==)\s*([\d.]+)(?:\.\*)?\s*", condition)
        assert match, wanted
        bound = _numbers(match[2])
        have = _numbers(version)
        if match[1] == ">=" and have < bound:
            return False
        if match[1] == "<" and have[: len(bound)] >= bound:
            return False
        if match[1] == "==" and have[: len(bound)] != bound:
            return False
    return True


def check_packages() -> Iterator[Finding]:
    """Every required package, by its installed version."""
    good: list[str] = []
    for name, wanted in requirements():
        mend = f"{PIP} '{name}{wanted}'"
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding("fail", name, "not installed", mend)
            continue
        if not in_range(version, wanted):
            yield Finding("fail", name, f"{version}, needed: {wanted}", mend)
        elif name in ("torch", "triton"):
            yield Finding("ok", name, version)
        else:
            good.append(f"{name} {version}")
    yield Finding("ok", "packages", ", ".join(good))


def nvidia_smi() -> list[str]:
    """``name, driver, memory`` of every NVIDIA GPU, as the driver's own tool sees them."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            query, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def check_devices() -> Iterator[Finding]:
    """What torch can compute on, and GPUs it does not see."""
    try:
        import torch

        from squall.kernels.backends.device import all_backends
    except Exception as error:  # a broken installation fails in many ways
        text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        yield Finding(
            "fail", "torch", f"cannot be imported: {text}", f"{PIP} --force-reinstall torch"
        )
        return
    usable = [b for b in all_backends() if b.available() is None]
    for backend in usable:
        for index in range(backend.count()):
            device = torch.device(backend.type, index)
            free, total = backend.memory(device)
            yield Finding(
                "ok",
                backend.type if backend.type == "cpu" else f"{backend.type}:{index}",
                f"{backend.describe(device)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, "
                f"auto dtype {str(backend.default_dtype(device)).removeprefix('torch.')}",
            )
    gpus = nvidia_smi()
    for line in gpus:
        yield Finding("ok", "driver", line)
    cuda = next(b for b in all_backends() if b.type == "cuda")
    if gpus and cuda not in usable:
        yield Finding("fail", "GPU", f"cannot be used: {cuda.available()}", _mend_cuda(torch))
    elif all(b.type == "cpu" for b in usable):
        yield Finding("warn", "GPU", "none that torch can use; Squall computes on the CPU")


def _mend_cuda(torch: ModuleType) -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return f"{PIP} --force-reinstall torch   (a build for CUDA)"
    if not torch.cuda.is_available():
        return f"update the NVIDIA driver: this torch is built for CUDA {torch.version.cuda}"
    return f"{PIP} triton"


def check_compiler() -> Iterator[Finding]:
    """Triton compiles its launchers, and the CPU kernels, with the system's C compiler."""
    for name in filter(None, (os.environ.get("CC"), "cc", "gcc", "clang")):
        path = shutil.which(name.split()[0])
        if path:
            yield Finding("ok", "C compiler", path)
            return
    yield Finding(
        "warn",
        "C compiler",
        "none found; a GPU needs one, a CPU is slower without",
        "install gcc or clang (Debian and Ubuntu: apt install gcc)",
    )


def check_caches() -> Iterator[Finding]:
    """Folders that fill up."""
    from squall.kernels.cache import cache_dir

    yield _folder("cache", cache_dir(), "set SQUALL_CACHE to a folder that can be written")
    try:
        from huggingface_hub import constants
    except ImportError:
        return  # check_packages has said so
    folder = Path(constants.HF_HUB_CACHE)
    yield _folder("hub cache", folder, "set HF_HOME to a folder that can be written")


def _folder(name: str, path: Path, mend: str) -> Finding:
    existing = path
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return Finding("fail", name, f"{path}: cannot be written", mend)
    free = shutil.disk_usage(existing).free
    text = f"{path}, {free / GIB:.1f} GiB free"
    if free < SPACE_WARNING:
        return Finding("warn", name, text, "free some space, or " + mend)
    return Finding("ok", name, text)


def check_hub() -> Iterator[Finding]:
    """Whether models can be downloaded; local and cached ones need no hub."""
    try:
        from huggingface_hub import constants, get_token
    except ImportError:
        return
    if constants.HF_HUB_OFFLINE:
        yield Finding("warn", "hub", "HF_HUB_OFFLINE is set: only local and cached models")
        return
    token = "with a token" if get_token() else "no token: only public models"
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=HUB_SECONDS):
            pass
    except urllib.error.HTTPError as error:  # it answers
        error.close()
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        text = f"{constants.ENDPOINT} cannot be reached ({reason}): only local and cached models"
        yield Finding("warn", "hub", text, "check the network, HTTPS_PROXY and HF_ENDPOINT")
        return
    yield Finding("ok", "hub", f"{constants.ENDPOINT} answers, {token}")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    check_python,
    check_packages,
    check_devices,
    check_compiler,
    check_caches,
    check_hub,
)
