"""Request bodies to ``SamplingParams`` and to the messages a chat template is given."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from squall.runtime.params import ParamError, SamplingParams
from squall.server.errors import ApiError
from squall.server.schema import (
    AnyPart,
    AssistantMessage,
    ChatBody,
    CompletionBody,
    DeveloperMessage,
    GenerationBody,
    Message,
    TextPart,
    ToolCall,
    ToolMessage,
)

COMPLETION_MAX_TOKENS = 16  # the API's default for /v1/completions
_SAME_NAME = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "n",
    "seed",
    "ignore_eos",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "dry_multiplier",
    "dry_base",
    "dry_allowed_length",
)


def chat_params(body: ChatBody) -> SamplingParams:
    """What a chat request asks of generation. Raises ApiError for what cannot be granted."""
    _check_chat(body)
    values = _shared(body)
    if body.max_completion_tokens is not None:
        if body.max_tokens not in (None, body.max_completion_tokens):
            raise ApiError(
                400,
                "max_tokens and max_completion_tokens differ; give one of them",
                param="max_tokens",
            )
        values["max_tokens"] = body.max_completion_tokens
    if body.logprobs:
        values["logprobs"] = body.top_logprobs or 0
    elif body.top_logprobs is not None:
        raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    return SamplingParams(**values)


def _check_chat(body: ChatBody) -> None:
    """Refuse what the API has and this server has not."""
    only: tuple[tuple[str, Any, tuple[Any, ...]], ...] = (
        ("response_format.type", body.response_format and body.response_format.type, ("text",)),
        ("modalities", body.modalities, (["text"],)),
        ("service_tier", body.service_tier, ("auto", "default")),
        ("store", body.store, (False,)),
        ("tool_choice", body.tool_choice, ("none",)),
    )
    for field, value, accepted in only:
        if value is not None and value not in accepted:
            raise only_accepted(field, value, accepted)


def only_accepted(field: str, value: Any, accepted: Iterable[Any]) -> ApiError:
    """400 for a value that the API knows and this server does not implement."""
    spelled = " or ".join(msgspec.json.encode(one).decode() for one in accepted)
    shown = msgspec.json.encode(value).decode()
    if len(shown) > 100:
        shown = shown[:97] + "..."
    return ApiError(
        400,
        f"unsupported value of '{field}': {shown}; {spelled} is accepted",
        param=field,
        code="unsupported_value",
    )


def completion_params(body: CompletionBody) -> SamplingParams:
    """What a completion request asks of generation. Raises ApiError."""
    values = _shared(body)
    values.setdefault("max_tokens", COMPLETION_MAX_TOKENS)
    if body.best_of is not None and body.best_of != values.get("n", 1):
        raise ApiError(
            400, "best_of is supported only when it equals n (nothing is ranked)", param="best_of"
        )
    if body.logprobs is not None:
        if body.echo:
            raise ApiError(
                400, "logprobs of the prompt (echo with logprobs) are not supported", param="echo"
            )
        values["logprobs"] = body.logprobs
    return SamplingParams(**values)


def wants_usage(body: GenerationBody) -> bool:
    """Whether a stream is to end with the usage chunk. Raises ApiError for a misused option."""
    options = body.stream_options
    if options is None:
        return False
    if not body.stream:
        raise ApiError(400, "stream_options needs stream to be true", param="stream_options")
    if options.include_obfuscation:
        raise only_accepted("stream_options.include_obfuscation", True, (False,))
    return bool(options.include_usage)


def validate(params: SamplingParams, vocab_size: int, names: Mapping[str, str]) -> None:
    """Check the ranges. Raises ApiError naming the request's field; ``names`` maps
    SamplingParams' names to the request's where they differ."""
    try:
        params.validate(vocab_size)
    except ParamError as error:
        field = names.get(error.param, error.param)
        message = error.message.replace(error.param, field, 1)
        raise ApiError(400, message, param=field) from None


def _shared(body: GenerationBody) -> dict[str, Any]:
    values: dict[str, Any] = {
        name: value for name in _SAME_NAME if (value := getattr(body, name)) is not None
    }
    if body.stop is not None:
        values["stop"] = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
    if body.stop_token_ids is not None:
        values["stop_token_ids"] = tuple(body.stop_token_ids)
    if body.dry_sequence_breakers is not None:
        values["dry_sequence_breakers"] = tuple(body.dry_sequence_breakers)
    if body.logit_bias is not None:
        values["logit_bias"] = _logit_bias(body.logit_bias)
    return values


def _logit_bias(given: dict[str, float]) -> dict[int, float]:
    bias: dict[int, float] = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            shown = key if len(key) <= 40 else key[:37] + "..."
            raise ApiError(
                400, f"logit_bias key {shown!r}: token ids are expected", param="logit_bias"
            )
        bias[int(key)] = value
    return bias


# -- messages --------------------------------------------------------------------------------


def template_messages(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """Messages as ``ChatTemplate.render`` takes them; ``developer``, which few templates know,
    is ``system``. Raises ApiError."""
    return [_template_message(f"messages[{i}]", message) for i, message in enumerate(messages)]


def _template_message(at: str, message: Message) -> dict[str, Any]:
    role = "system" if isinstance(message, DeveloperMessage) else message.__struct_config__.tag
    out: dict[str, Any] = {"role": role, "content": _content(f"{at}.content", message.content)}
    if message.name is not None:
        out["name"] = message.name
    if isinstance(message, ToolMessage):
        out["tool_call_id"] = message.tool_call_id
    if isinstance(message, AssistantMessage):
        if message.tool_calls:
            calls = enumerate(message.tool_calls)
            out["tool_calls"] = [_tool_call(f"{at}.tool_calls[{i}]", call) for i, call in calls]
        elif message.content is None:
            raise ApiError(
                400,
                f"{at}.content is null; an assistant message without tool_calls needs text",
                param=f"{at}.content",
            )
    return out


def _content(at: str, content: str | Sequence[AnyPart] | None) -> Any:
    if content is None or isinstance(content, str):
        return content
    for i, part in enumerate(content):
        if not isinstance(part, TextPart):
            kind = str(part.__struct_config__.tag)
            what = {"image_url": "images", "input_audio": "audio", "file": "files"}[kind]
            raise ApiError(
                400,
                f"this model takes no {what} ({at}[{i}] has the type {kind!r})",
                param=f"{at}[{i}].type",
                code="unsupported_content",
            )
    return [msgspec.to_builtins(part) for part in content]


def _tool_call(at: str, call: ToolCall) -> dict[str, Any]:
    try:
        msgspec.json.decode(call.function.arguments, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        field = f"{at}.function.arguments"
        raise ApiError(400, f"{field} is not a JSON object", param=field) from None
    shown: dict[str, Any] = msgspec.to_builtins(call)
    return shown
