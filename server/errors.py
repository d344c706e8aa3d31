"""Errors as the OpenAI API shows them: ``{"error": {message, type, param, code}}``."""

import msgspec

from squall.server.messages import Headers, Response

INVALID_REQUEST = "invalid_request_error"
SERVER_ERROR = "server_error"
RATE_LIMIT = "rate_limit_error"


class ErrorDetail(msgspec.Struct, frozen=True):
    """The inner object of an error body."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True):
    """An error body, and the payload of an error event inside a stream."""

    error: ErrorDetail


class ApiError(Exception):
    """A request that fails with this status and error body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        type: str | None = None,
        headers: Headers = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers
        kind = type or (SERVER_ERROR if status >= 500 else INVALID_REQUEST)
        self.detail = ErrorDetail(message, kind, param, code)

    def body(self) -> bytes:
        """The JSON of the error body."""
        return msgspec.json.encode(ErrorBody(self.detail))

    def response(self) -> Response:
        """The HTTP response that reports this error."""
        return Response(self.status, self.body(), headers=self.headers)


def unavailable(message: str, code: str, retry_after: int | None = None) -> ApiError:
    """503 with ``code`` (``loading``, ``draining``, ``engine_dead``) and maybe ``Retry-After``."""
    headers = ((b"retry-after", b"%d" % retry_after),) if retry_after is not None else ()
    return ApiError(503, message, code=code, headers=headers)


def internal_error() -> ApiError:
    """500 for a bug here; what happened is in the log, not in the response."""
    return ApiError(500, "internal error: see the server's log", code="internal_error")
