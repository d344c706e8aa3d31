"""The threads of the native CPU libraries (``team.c``): one team a process, shared by all."""

import ctypes
import functools
from pathlib import Path

from squall.kernels.native.build import load_library

_FOLDER = Path(__file__).parent
_SOURCES = (_FOLDER / "team.c", _FOLDER / "team.h")
_FLAGS = ("-pthread",)


@functools.cache
def team() -> int:
    """Address of ``squall_team_run``, which the other libraries take. Raises ``Unavailable``."""
    library = load_library(_SOURCES, _FLAGS)
    address = ctypes.cast(library.squall_team_run, ctypes.c_void_p).value
    assert address is not None
    return address
