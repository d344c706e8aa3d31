"""What ``hub`` needs around ``huggingface_hub``: tokens, errors in one line, download progress.

``huggingface_hub`` takes a third of a second to import, so it is imported where it is used: a
local model never needs it.
"""

import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, cast

from squall.loaders.errors import ModelLoadError
from squall.loaders.hf_config import shorten
from squall.loaders.progress import Advance

_TOKEN_SOURCES: Final = "literal:VALUE, env:VARIABLE, path:FILE, cache, none"


def check_token_source(source: str) -> None:
    """Raise ``ModelLoadError`` unless the text has the form of a token source."""
    kind, colon, value = source.partition(":")
    if not (
        source in ("cache", "none") or (kind in ("literal", "env", "path") and colon and value)
    ):
        # What follows the colon may be a secret.
        raise ModelLoadError(f"token source {shorten(kind)}: accepted: {_TOKEN_SOURCES}")


def read_token(source: str) -> str | None:
    """The access token a ``--token-source`` leads to; None to go without one."""
    check_token_source(source)
    kind, _, value = source.partition(":")
    if kind == "none":
        return None
    if kind == "cache":
        from huggingface_hub import get_token

        return get_token()
    if kind == "env":
        token = os.environ.get(value, "")
        problem = f"variable {value} is not set"
    elif kind == "path":
        file = Path(value).expanduser()
        problem = f"{value}: no such file, or empty"
        token = file.read_text("utf-8", "replace") if file.is_file() else ""
    else:
        token, problem = value, "empty"
    token = token.strip()
    if not token:
        raise ModelLoadError(f"token source {kind}: {problem}")
    if not re.fullmatch(r"[!-~]+", token):
        raise ModelLoadError(f"token source {kind}: holds characters that no token has")
    return token


@contextmanager
def explained(repo: str, revision: str, source: str, has_token: bool) -> Iterator[None]:
    """Turn what ``huggingface_hub`` raises into one line that says what to do."""
    from huggingface_hub import errors

    # Of httpx or httpx2, by version.
    http_error = cast(type[Exception], errors.HfHubHTTPError.__bases__[0])
    where = repo if revision == "main" else f"{repo}@{revision}"
    used = source.partition(":")[0] + ("" if has_token else ", no token found")
    access = (
        f"token source used: {used}; accept its conditions on the hub, then run "
        "`hf auth login` or give a token source with access"
    )
    absent = (
        f"{where}: no such repository on the hub, or a private one ({access}); "
        "there is no local folder of this name either"
    )
    try:
        yield
    except errors.GatedRepoError:
        raise ModelLoadError(f"{where}: this model's access is restricted ({access})") from None
    except errors.RepositoryNotFoundError:
        raise ModelLoadError(absent) from None
    except errors.RevisionNotFoundError:
        raise ModelLoadError(f"{repo}: no revision {revision}") from None
    except errors.LocalEntryNotFoundError as error:
        raise ModelLoadError(f"{where}: {_network_problem(error)}") from None
    except errors.EntryNotFoundError:
        raise ModelLoadError(f"{where}: a file of it is gone from the hub") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:  # the hub's answer to anonymous requests for what it does not have
            raise ModelLoadError(absent) from None
        if status == 403:
            raise ModelLoadError(f"{where}: the hub refuses access ({access})") from None
        raise ModelLoadError(f"{where}: the hub answered with HTTP status {status}") from None
    except (http_error, OSError) as error:
        raise ModelLoadError(f"{where}: {_network_problem(error)}") from None


def _network_problem(error: Exception) -> str:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = " ".join(str(cause).split())[:200] or type(cause).__name__
    return f"not in the cache, and the hub cannot be reached or the download broke off ({text})"


def byte_counter(advance: Advance, total: int) -> Any:
    """A tqdm class that shows nothing and reports downloaded bytes.

    ``huggingface_hub`` opens several bars: files (no unit), and bytes once or twice (received and
    written). The furthest byte bar counts; a bar that moves back, when a server cannot resume,
    is waited for.
    """
    from huggingface_hub import utils

    tqdm: Any = utils.tqdm  # type: ignore[attr-defined]
    lock = threading.Lock()
    shown = 0

    def report(done: float) -> None:
        nonlocal shown
        with lock:
            new = min(int(done), total) - shown
            if new > 0:
                shown += new
                advance(new)

    return type("ByteCounter", (tqdm,), _counter_methods(tqdm, report))


def _counter_methods(base: Any, report: Callable[[float], None]) -> dict[str, Any]:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        self.counts_bytes = kwargs.get("unit") == "B"
        self.done = kwargs.get("initial") or 0
        kwargs["disable"] = True
        base.__init__(self, *args, **kwargs)

    def update(self: Any, n: float | None = 1) -> None:
        self.done += n or 0
        if self.counts_bytes:
            report(self.done)

    return {"__init__": __init__, "update": update}
