"""Compile every kernel variant of the case tables for one chip, without a GPU.

``python aot_compile.py 90`` runs the launchers on CPU tensors with Triton's driver replaced by one
that names the chip (an NVIDIA compute capability) and with every launch turned into a compile.
Prints one JSON object per compiled kernel: name, case, dtype, shared memory and machine
code in bytes.
"""

import json
import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from squall.kernels.cases import all_cases


class OfflineDriver:
    """What Triton asks of a driver in order to compile."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main(capability: int) -> None:
    driver.set_active(OfflineDriver(capability))
    launch = JITFunction.run
    compiled: dict[int, tuple[str, Any]] = {}

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        assert all(isinstance(n, int) and n > 0 for n in grid), f"grid {grid}"
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.setdefault(id(kernel), (self.__name__, kernel))
        return kernel

    JITFunction.run = compile_only
    for case in all_cases():
        for dtype in case.aot:
            known = set(compiled)
            case.launcher(*case.build(dtype, torch.device("cpu")))
            for key in compiled.keys() - known:
                name, kernel = compiled[key]
                row = {"kernel": name, "case": case.name, "dtype": str(dtype)}
                row |= {"shared": kernel.metadata.shared, "cubin": len(kernel.asm["cubin"])}
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
