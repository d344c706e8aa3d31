"""Request bodies as msgspec Structs: the OpenAI API's fields, plus Squall's sampling fields.

A field annotated ``None`` belongs to the API but is not supported: it may be null (which always
means "not given"), anything else is a 400 naming it. So is any field that is not listed here.
Identification and cache hints (``user``, ``safety_identifier``, ``metadata``,
``prompt_cache_key``) are accepted: by their definition they do not change the answer.
Source: the OpenAI API reference, Chat Completions and Completions, "create".
"""

import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from squall.server.errors import ApiError

Strict = TypeVar("Strict")

NonEmpty = Meta(min_length=1)


class Body(msgspec.Struct, forbid_unknown_fields=True):
    """Base of everything a client sends."""


# -- chat messages ---------------------------------------------------------------------------


class TextPart(Body, kw_only=True, tag_field="type", tag="text"):
    text: str


class ImagePart(Body, kw_only=True, tag_field="type", tag="image_url"):
    image_url: Any = None


class AudioPart(Body, kw_only=True, tag_field="type", tag="input_audio"):
    input_audio: Any = None


class FilePart(Body, kw_only=True, tag_field="type", tag="file"):
    file: Any = None


TextContent = str | Annotated[list[TextPart], NonEmpty]
AnyPart = TextPart | ImagePart | AudioPart | FilePart


class SystemMessage(Body, kw_only=True, tag_field="role", tag="system"):
    content: TextContent
    name: str | None = None


class DeveloperMessage(Body, kw_only=True, tag_field="role", tag="developer"):
    content: TextContent
    name: str | None = None


class UserMessage(Body, kw_only=True, tag_field="role", tag="user"):
    content: str | Annotated[list[AnyPart], NonEmpty]
    name: str | None = None


class CalledFunction(Body, kw_only=True):
    name: str
    arguments: str  # JSON


class ToolCall(Body, kw_only=True):
    id: str
    function: CalledFunction
    type: Literal["function"] = "function"


class AssistantMessage(Body, kw_only=True, tag_field="role", tag="assistant"):
    content: TextContent | None = None  # null is legal beside tool_calls only
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    annotations: Annotated[list[Any], Meta(max_length=0)] | None = None  # as OpenAI returns it
    refusal: None = None
    audio: None = None
    function_call: None = None


class ToolMessage(Body, kw_only=True, tag_field="role", tag="tool"):
    content: TextContent
    tool_call_id: str
    name: str | None = None


Message = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage
Messages = Annotated[list[Message], NonEmpty]


# -- completions -----------------------------------------------------------------------------


class StreamOptions(Body, kw_only=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # false only: nothing is padded here


class GenerationBody(Body, kw_only=True):
    """Fields that chat completions and completions share."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    seed: int | None = None
    logit_bias: dict[str, float] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    dry_multiplier: float | None = None
    dry_base: float | None = None
    dry_allowed_length: int | None = None
    dry_sequence_breakers: list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class ResponseFormat(Body, kw_only=True):
    type: str
    json_schema: Any = None


class ChatBody(GenerationBody, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    modalities: list[str] | None = None  # ["text"] only
    service_tier: str | None = None  # "auto" and "default" only: there is one tier
    store: bool | None = None  # false only
    tool_choice: Any = None  # "none" only
    tools: None = None
    parallel_tool_calls: None = None
    functions: None = None
    function_call: None = None
    audio: None = None
    prediction: None = None
    prompt_cache_retention: None = None
    reasoning_effort: None = None
    verbosity: None = None
    web_search_options: None = None


class CompletionBody(GenerationBody, kw_only=True):
    """POST /v1/completions. A list prompt is all strings, all ids, or all lists of ids."""

    prompt: str | list[str | int | list[int]]
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    suffix: None = None


class TokenizeBody(Body, kw_only=True):
    """POST /tokenize: exactly one of ``text``, ``prompt`` (the same) and ``messages``."""

    model: str | None = None
    text: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None


class DetokenizeBody(Body, kw_only=True):
    """POST /detokenize."""

    tokens: list[int]
    model: str | None = None
    skip_special_tokens: bool | None = None


# -- decoding --------------------------------------------------------------------------------

_UNKNOWN = re.compile(r"Object contains unknown field `(?P<name>.*)`", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<name>.*)`", re.DOTALL)
_PATH = re.compile(r" - at `(?P<path>[^`]*)`$")


def decode(decoder: msgspec.json.Decoder[Strict], body: bytes) -> Strict:
    """The body as the decoder's type. Raises ApiError (400) naming the field."""
    if not body:
        raise ApiError(400, "the request body is empty; a JSON object is expected")
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _explain(str(error)) from None
    except msgspec.DecodeError as error:
        raise ApiError(400, f"the request body is not valid JSON: {error}") from None
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the request body is not valid UTF-8: {error.reason}") from None
    except RecursionError:
        raise ApiError(400, "the request body's JSON is nested too deeply") from None


def _explain(message: str) -> ApiError:
    """msgspec's message with the field's path taken out of it."""
    at = _PATH.search(message)
    path = at["path"].removeprefix("$").removeprefix(".") if at else ""
    text = message[: at.start()] if at else message
    unknown, missing = _UNKNOWN.fullmatch(text), _MISSING.fullmatch(text)
    if unknown:
        return unsupported(_join(path, unknown["name"]))
    if text.startswith("Expected `null`, got"):
        return unsupported(path)
    if missing:
        field = _join(path, missing["name"])
        return ApiError(400, f"the field '{field}' is required", param=field)
    text = text.replace("`", "'")
    if not path:
        return ApiError(400, f"the request body: {text}")
    return ApiError(400, f"field '{path}': {text}", param=path)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def unsupported(field: str) -> ApiError:
    """400 for a field that this server does not know or does not implement."""
    shown = field if len(field) <= 200 else field[:197] + "..."
    return ApiError(400, f"unsupported field '{shown}'", param=shown, code="unsupported_field")
