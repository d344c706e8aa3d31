"""Where Squall keeps what it can make or fetch again."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """``$SQUALL_CACHE``, or ``squall`` in the user's cache folder."""
    chosen = os.environ.get("SQUALL_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "squall"
