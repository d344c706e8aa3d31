"""Which handler answers a request, and which requests are refused before any handler runs."""

from collections.abc import Sequence
from dataclasses import dataclass

from squall.server.errors import ApiError
from squall.server.listener import is_loopback
from squall.server.messages import Handler, Request, Response, StreamingResponse

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


@dataclass(frozen=True, slots=True)
class Route:
    """``path`` is exact, or ends with ``/*`` for anything non-empty below it."""

    method: str
    path: str
    handler: Handler

    @property
    def shown(self) -> str:
        return f"{self.method} {self.path}"


class Router:
    """The server's ``app``: guards, then the table of routes. Never raises ApiError."""

    def __init__(self, routes: Sequence[Route], *, loopback_only: bool) -> None:
        """``loopback_only``: the server listens on a loopback address, so that a request for
        any other host name comes from a page that rebound its name to it (CVE-2024-28224)."""
        self._loopback_only = loopback_only
        self._exact: dict[str, dict[str, Handler]] = {}
        self._below: dict[str, dict[str, Handler]] = {}
        for route in routes:
            prefix = route.path.removesuffix("*")
            table = self._exact if prefix == route.path else self._below
            table.setdefault(prefix, {})[route.method] = route.handler

    async def __call__(self, request: Request) -> Response | StreamingResponse:
        """Answer ``request``."""
        try:
            self._check_origin(request)
            return await self._dispatch(request)
        except ApiError as error:
            return error.response()

    def _check_origin(self, request: Request) -> None:
        if self._loopback_only and request.host and not is_loopback(host_name(request.host)):
            raise ApiError(
                403,
                f"the host {request.host!r} is not served: this server listens on the loopback "
                "interface and answers to localhost, 127.0.0.1 and [::1]",
                code="host_not_allowed",
            )
        # CORS is off: a browser may not use this API from another site's page, not even with
        # the requests that it sends without asking first.
        origin = request.headers.get("origin")
        if (
            origin is not None
            and request.method not in SAFE_METHODS
            and origin.partition("://")[2].lower() != request.host.lower()
        ):
            raise ApiError(
                403,
                f"requests from pages of the origin {origin!r} are not allowed",
                code="origin_not_allowed",
            )

    async def _dispatch(self, request: Request) -> Response | StreamingResponse:
        if request.path == "*" and request.method == "OPTIONS":
            return _options(("GET", "HEAD", "OPTIONS", "POST"))
        methods = self._find(request.path)
        if methods is None:
            raise ApiError(404, f"there is no {_short(request.path)}", code="not_found")
        handler = methods.get("GET" if request.method == "HEAD" else request.method)
        if handler is not None:
            return await handler(request)
        allowed = {*methods, "OPTIONS"} | ({"HEAD"} if "GET" in methods else set())
        if request.method == "OPTIONS":
            return _options(allowed)
        raise ApiError(
            405,
            f"{_short(request.path)} does not take {request.method}",
            code="method_not_allowed",
            headers=((b"allow", ", ".join(sorted(allowed)).encode()),),
        )

    def _find(self, path: str) -> dict[str, Handler] | None:
        methods = self._exact.get(path)
        if methods is None:
            for prefix, below in self._below.items():
                if path.startswith(prefix) and path != prefix:
                    return below
        return methods


def host_name(authority: str) -> str:
    """The host of ``host[:port]``, without an IPv6 address's brackets."""
    if authority.startswith("["):
        return authority[1:].partition("]")[0]
    return authority.partition(":")[0]


def _options(allowed: "Sequence[str] | set[str]") -> Response:
    return Response(204, headers=((b"allow", ", ".join(sorted(allowed)).encode()),))


def _short(path: str) -> str:
    return path if len(path) <= 100 else path[:97] + "..."
