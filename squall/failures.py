"""What an exception means on the command line: an exit code and one line, no traceback.

Exceptions are told apart by class name: the engine's process sends only names, and importing the
classes would import torch, which a mistyped flag should not have to wait for.
"""

from typing import Final

USAGE: Final = 2  # the command line asks for something that is not accepted
FAILED: Final = 1
INTERRUPTED: Final = 130  # 128 + SIGINT, as shells have it

_CODES: Final = {
    "UsageError": USAGE,
    "OptionError": USAGE,
    "DeviceError": USAGE,
    "ParamError": USAGE,
    "EmptyPrompt": USAGE,
    "ModelLoadError": FAILED,
    "StartupError": FAILED,
    "KVMemoryError": FAILED,
    "PromptTooLong": FAILED,
    "TemplateError": FAILED,
    "QueueFull": FAILED,
    "EngineDead": FAILED,
    "GenerationError": FAILED,
}


class UsageError(Exception):
    """The command line cannot be followed; the message is one line."""


def kind_of(error: BaseException) -> str:
    """The class name of what went wrong, in this process or in the engine's."""
    name = type(error).__name__
    return str(getattr(error, "kind", name)) if name == "StartupError" else name


def exit_code(error: BaseException) -> int:
    """The exit code for an exception, 1 for one that nobody expected."""
    return _CODES.get(kind_of(error), FAILED)


def one_line(error: BaseException) -> str:
    """The exception as one line; unexpected ones are named and marked as our fault."""
    message = " ".join(str(error).split())
    kind = kind_of(error)
    if kind in _CODES:
        return message or kind
    if isinstance(error, OSError):
        return message or kind
    text = f"{kind}: {message}" if message else kind
    return f"internal error: {text} (--debug shows where)"
