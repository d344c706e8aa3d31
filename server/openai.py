"""The table of endpoints, and the small ones: models, tokens, health."""

from collections.abc import Awaitable, Callable
from functools import partial
from urllib.parse import unquote

import msgspec

from squall.server.backend import Backend
from squall.server.chat import chat_completions, encode_messages
from squall.server.completions import check_ids, completions
from squall.server.errors import ApiError
from squall.server.messages import Request, Response, StreamingResponse
from squall.server.router import Route
from squall.server.schema import DetokenizeBody, TokenizeBody, decode
from squall.server.state import ServerState

_encode = msgspec.json.Encoder().encode
_tokenize_decoder = msgspec.json.Decoder(TokenizeBody)
_detokenize_decoder = msgspec.json.Decoder(DetokenizeBody)

MODELS = "/v1/models"


class ModelEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of GET /v1/models."""

    id: str
    object: str = "model"
    created: int  # Unix seconds
    owned_by: str = "squall"
    max_model_len: int  # tokens


def _entry(backend: Backend, name: str) -> ModelEntry:
    card = backend.card
    return ModelEntry(id=name, created=card.created, max_model_len=card.max_model_len)


async def list_models(state: ServerState, request: Request) -> Response:
    """GET /v1/models."""
    backend = state.require_backend()
    entries = [_entry(backend, name) for name in state.names(backend)]
    return Response(body=_encode({"object": "list", "data": entries}))


async def get_model(state: ServerState, request: Request) -> Response:
    """GET /v1/models/{id}; the id may hold slashes."""
    backend = state.require_backend()
    name = unquote(request.path.removeprefix(MODELS + "/"))
    state.check_model(backend, name)
    if name == "default":
        name = state.names(backend)[0]
    return Response(body=_encode(_entry(backend, name)))


async def tokenize(state: ServerState, request: Request) -> Response:
    """POST /tokenize: the ids of a text or of a chat."""
    backend = state.require_backend()
    body = decode(_tokenize_decoder, request.body)
    state.check_model(backend, body.model)
    texts = [text for text in (body.text, body.prompt) if text is not None]
    if len(texts) + (body.messages is not None) != 1:
        raise ApiError(400, "give exactly one of text, prompt and messages", param="text")
    if body.messages is not None:
        if body.add_special_tokens is not None:
            raise ApiError(
                400,
                "the chat template decides about special tokens; add_special_tokens is for text",
                param="add_special_tokens",
            )
        ids = await encode_messages(
            state, backend, body.messages, body.add_generation_prompt is not False
        )
    else:
        if body.add_generation_prompt is not None:
            raise ApiError(
                400, "add_generation_prompt is for messages", param="add_generation_prompt"
            )
        text = texts[0]
        encode = backend.encode_text
        if body.add_special_tokens is False:
            encode = partial(backend.tokenizer.encode, add_special=False)
        ids = await state.work_on(len(text), partial(encode, text))
    limit = backend.card.max_model_len
    return Response(body=_encode({"tokens": ids, "count": len(ids), "max_model_len": limit}))


async def detokenize(state: ServerState, request: Request) -> Response:
    """POST /detokenize: the text of ids, special tokens by name unless they are skipped."""
    backend = state.require_backend()
    body = decode(_detokenize_decoder, request.body)
    state.check_model(backend, body.model)
    check_ids("tokens", body.tokens, backend.card.vocab_size)
    decode_ids = partial(backend.tokenizer.decode, skip_special=bool(body.skip_special_tokens))
    text = await state.work_on(len(body.tokens), partial(decode_ids, body.tokens))
    return Response(body=_encode({"text": text, "prompt": text}))


async def health(state: ServerState, request: Request) -> Response:
    """GET /health: 200 when requests are served, else 503 with the reason."""
    problem = state.health()
    if problem is None:
        return Response(body=b'{"status":"ok"}')
    body = {"status": problem.detail.code, "reason": problem.detail.message}
    return Response(problem.status, _encode(body), headers=problem.headers)


async def show_version(state: ServerState, request: Request) -> Response:
    """GET /version."""
    return Response(body=_encode({"version": state.version}))


async def show_root(state: ServerState, request: Request) -> Response:
    """GET /: what this is and where things are."""
    paths = sorted({route.shown for route in routes(state)})
    return Response(body=_encode({"name": "squall", "version": state.version, "endpoints": paths}))


Endpoint = Callable[[ServerState, Request], Awaitable[Response | StreamingResponse]]

_ENDPOINTS: tuple[tuple[str, str, Endpoint], ...] = (
    ("POST", "/v1/chat/completions", chat_completions),
    ("POST", "/v1/completions", completions),
    ("GET", MODELS, list_models),
    ("GET", MODELS + "/*", get_model),
    ("POST", "/tokenize", tokenize),
    ("POST", "/detokenize", detokenize),
    ("GET", "/health", health),
    ("GET", "/version", show_version),
    ("GET", "/", show_root),
)


def routes(state: ServerState) -> list[Route]:
    """Every endpoint, bound to ``state``."""
    return [Route(method, path, partial(run, state)) for method, path, run in _ENDPOINTS]
