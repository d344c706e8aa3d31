"""Kinds of arguments on the command line; a wrong one is told with what would be accepted."""

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

MAX_INT: Final = 2**31 - 1


def integer(low: int, high: int = MAX_INT) -> Callable[[str], int]:
    """An integer from ``low`` to ``high``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"{text[:40]!r} is given, expected an integer from {low} to {high}"
            )
        return value

    return parse


def number(low: float, high: float, *, above: bool = False) -> Callable[[str], float]:
    """A number from ``low`` (or, ``above`` it) to ``high``; never NaN."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or (above and value == low):
            begin = f"above {low:g} and up to" if above else f"from {low:g} to"
            raise argparse.ArgumentTypeError(
                f"{text[:40]!r} is given, expected a number {begin} {high:g}"
            )
        return value

    return parse


def token_source(text: str) -> str:
    """See ``squall.loaders.hub.resolve``."""
    if not re.fullmatch(r"cache|none|(literal|env|path):.+", text):
        # What was given may be a token: do not print it.
        raise argparse.ArgumentTypeError(
            "accepted: literal:VALUE, env:VARIABLE, path:FILE, cache, none"
        )
    return text


def existing_file(text: str) -> str:
    """The path of a file that is there."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text}: no such file")
    return text
