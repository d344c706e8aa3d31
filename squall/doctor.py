"""``squall doctor``: what this machine has, what it lacks, and the command that mends it."""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal

from squall import __version__

_HUB_S: Final = 3.0
_COMMAND_S: Final = 10.0
_LOW_SPACE: Final = 5 << 30  # bytes free below which a download is likely to fail
_GIB: Final = 1 << 30
_PIP: Final = "python -m pip install"


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``mend`` is the command or step that helps.

    ``warn`` is something that works less well, or an extra that is not there; ``fail`` something
    Squall cannot work without.
    """

    state: Literal["ok", "warn", "fail"]
    name: str
    text: str
    mend: str | None = None


Check = Callable[[], Iterable[Finding]]


def doctor(*, as_json: bool = False, checks: Sequence[Check] | None = None) -> int:
    """Print the report to standard output; 1 if something that is needed is missing, else 0."""
    found: list[Finding] = []
    for check in CHECKS if checks is None else checks:
        for finding in _guarded(check):
            found.append(finding)
            if not as_json:
                _show(finding)
    failed = sum(finding.state == "fail" for finding in found)
    if as_json:
        report = {
            "squall": __version__,
            "usable": not failed,
            "findings": [asdict(f) for f in found],
        }
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        print(
            f"\n{failed} needed thing(s) missing, see FAIL" if failed else "\nSquall can work here"
        )
    return int(failed > 0)


def _guarded(check: Check) -> Iterator[Finding]:
    """The findings of a check; one that breaks off is a finding itself."""
    try:
        yield from check()
    except Exception as error:
        name = getattr(check, "__name__", "check").removeprefix("check_")
        yield Finding("fail", name, f"cannot be checked: {_said(error)}")


def _show(finding: Finding) -> None:
    marks = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}
    print(f"{marks[finding.state]}  {finding.name:<16} {finding.text}", flush=True)
    if finding.mend:
        print(f"{'':22} -> {finding.mend}", flush=True)


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def check_python(version: tuple[int, int] = sys.version_info[:2]) -> Iterator[Finding]:
    """Interpreter and system."""
    text = f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    if version < (3, 11):
        yield Finding("fail", "python", text, "install Python 3.11 or newer")
    else:
        yield Finding("ok", "python", text)
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
    have = _numbers(version)
    for condition in filter(None, wanted.split(",")):
        match = re.fullmatch(r"\s*(>=|<|==)\s*([\d.]+?)(?:\.\*)?\s*", condition)
        assert match, wanted
        bound = _numbers(match[2])
        short = have[: len(bound)]
        if not {">=": short >= bound, "<": short < bound, "==": short == bound}[match[1]]:
            return False
    return True


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_packages(
    installed: Callable[[str], str | None] = _installed,
) -> Iterator[Finding]:
    """Every required package, by its ``installed`` version, and the extras."""
    for name, wanted in requirements():
        version = installed(name)
        mend = f"{_PIP} '{name}{wanted}'"
        if version is None:
            yield Finding("fail", name, f"not installed, needed: {wanted}", mend)
        elif not in_range(version, wanted):
            yield Finding("fail", name, f"{version}, needed: {wanted}", mend)
        else:
            yield Finding("ok", name, version)
    for name in ("xformers", "intel-extension-for-pytorch"):
        version = installed(name)
        short = "ipex" if name.startswith("intel") else name
        yield Finding("ok", short, version or "not installed (optional)")


def nvidia_smi() -> list[str]:
    """``name, driver, memory`` of every NVIDIA GPU, as the driver's own tool sees them."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = [
        "nvidia-smi",
        "--query-gpu=name,driver_version,memory.total",
        "--format=csv,noheader",
    ]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_COMMAND_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def check_devices(gpus: Callable[[], list[str]] = nvidia_smi) -> Iterator[Finding]:
    """What torch can compute on, and ``gpus`` that it does not see."""
    try:
        import torch

        from squall.kernels.backends.device import all_backends
    except Exception as error:  # a broken installation fails in many ways
        text = f"cannot be imported: {_said(error)}"
        yield Finding("fail", "torch", text, f"{_PIP} --force-reinstall torch")
        return
    version = torch.version
    built = f"CUDA {version.cuda}" if version.cuda else "CPU"
    if version.hip:
        built = f"ROCm {version.hip}"
    yield Finding("ok", "torch build", built)
    usable: list[str] = []
    for backend in all_backends():
        reason = backend.available()
        if reason is not None:
            yield Finding("ok", backend.type, f"not used: {reason}")
            continue
        usable.append(backend.type)
        for index in range(backend.count()):
            single = backend.type == "cpu"
            device = torch.device(backend.type) if single else torch.device(backend.type, index)
            free, total = backend.memory(device)
            dtype = str(backend.default_dtype(device)).removeprefix("torch.")
            yield Finding(
                "ok",
                str(device),
                f"{backend.describe(device)}, {free / _GIB:.1f} of {total / _GIB:.1f} GiB free, "
                f"auto dtype {dtype}",
            )
    seen = gpus()
    for line in seen:
        yield Finding("ok", "nvidia driver", line)
    if seen and "cuda" not in usable:
        mend = f"{_PIP} --force-reinstall torch   (a build for CUDA)"
        if version.cuda:
            mend = f"update the NVIDIA driver: this torch is built for CUDA {version.cuda}"
        yield Finding("fail", "cuda", "there is an NVIDIA GPU that torch cannot use", mend)
    if usable == ["cpu"]:
        yield Finding("warn", "gpu", "none that can be used: Squall computes on the CPU")
    elif not c_compiler():
        yield Finding("fail", "triton", "Triton needs a C compiler on this GPU", _compiler_mend())


def c_compiler(which: Callable[[str], str | None] = shutil.which) -> str | None:
    """The C compiler that Triton and the CPU kernels would take."""
    for name in filter(None, (os.environ.get("CC"), "cc", "gcc", "clang")):
        path = which(name.split()[0])
        if path:
            return path
    return None


def _compiler_mend() -> str:
    if platform.system() == "Darwin":
        return "xcode-select --install"
    return "sudo apt install gcc   (or dnf, zypper, pacman)"


def check_compiler(
    which: Callable[[str], str | None] = shutil.which,
) -> Iterator[Finding]:
    """The C compiler, what Triton needs besides, and the compiled CPU kernels."""
    path = c_compiler(which)
    if path is None:
        text = "none found: no GPU kernels, and slower ones on the CPU"
        yield Finding("warn", "c compiler", text, _compiler_mend())
        return
    yield Finding("ok", "c compiler", path)
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if platform.system() == "Linux" and not header.is_file():
        number = f"{sys.version_info.major}.{sys.version_info.minor}"
        text = f"{header} is missing: Triton cannot build its launchers for a GPU"
        yield Finding("warn", "python headers", text, f"sudo apt install python{number}-dev")
    yield from _native_kernels()


def _native_kernels() -> Iterator[Finding]:
    """Compiles the CPU kernels, if the cache has none yet (some seconds)."""
    try:
        from squall.kernels.quant.cpu_native import enable
    except ImportError as error:  # no torch, which check_devices has said, or no POSIX
        yield Finding("warn", "cpu kernels", f"slower ones are used: {_said(error)}")
        return
    reason = enable()
    if reason is None:
        yield Finding("ok", "cpu kernels", "compiled for this processor")
    else:
        yield Finding("warn", "cpu kernels", f"slower ones are used: {reason}")


def check_caches() -> Iterator[Finding]:
    """The folders that fill up."""
    from squall.kernels.cache import cache_dir

    yield _folder("cache", cache_dir(), "export SQUALL_CACHE=FOLDER   (one that can be written)")
    try:
        from huggingface_hub import constants
    except ImportError:
        return  # check_packages has said so
    folder = Path(constants.HF_HUB_CACHE)
    yield _folder("hub cache", folder, "export HF_HOME=FOLDER   (one that can be written)")


def _folder(name: str, path: Path, mend: str) -> Finding:
    existing = path
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return Finding("fail", name, f"{path}: cannot be written", mend)
    free = shutil.disk_usage(existing).free
    text = f"{path}, holds {_size(path) / _GIB:.1f} GiB, {free / _GIB:.1f} GiB free"
    if free < _LOW_SPACE:
        return Finding("warn", name, f"{text}: little for models", f"make room, or {mend}")
    return Finding("ok", name, text)


def _size(folder: Path) -> int:
    """Bytes of the files below a folder; links count as nothing."""
    total = 0
    for base, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(base, name)).st_size
            except OSError:  # gone in the meantime
                continue
    return total


def _head(url: str) -> str | None:
    """Why ``url`` cannot be reached, or None."""
    request = urllib.request.Request(url, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=_HUB_S):
            return None
    except urllib.error.HTTPError as error:  # it answers
        error.close()
        return None
    except (OSError, ValueError) as error:
        return " ".join(str(getattr(error, "reason", error)).split())


def check_hub(head: Callable[[str], str | None] = _head) -> Iterator[Finding]:
    """Whether models can be downloaded; local and cached ones need no hub."""
    try:
        from huggingface_hub import constants, get_token
    except ImportError:
        return
    if constants.HF_HUB_OFFLINE:
        text = "HF_HUB_OFFLINE is set: only local and cached models"
        yield Finding("warn", "hub", text, "unset HF_HUB_OFFLINE")
    else:
        reason = head(constants.ENDPOINT)
        if reason is None:
            yield Finding("ok", "hub", f"{constants.ENDPOINT} answers")
        else:
            text = f"{constants.ENDPOINT} cannot be reached ({reason})"
            mend = "check the network, HTTPS_PROXY and HF_ENDPOINT; local models work without"
            yield Finding("warn", "hub", text, mend)
    if get_token():
        yield Finding("ok", "hub token", "present")
    else:
        yield Finding("ok", "hub token", "none (only restricted models need one: hf auth login)")


CHECKS: Final[tuple[Check, ...]] = (
    check_python,
    check_packages,
    check_devices,
    check_compiler,
    check_caches,
    check_hub,
)
