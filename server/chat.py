"""POST /v1/chat/completions."""

import time
import uuid

import msgspec

from squall.loaders.chat_template import TemplateError
from squall.runtime.output import Logprob
from squall.server.backend import Backend
from squall.server.collect import collect
from squall.server.errors import ApiError
from squall.server.generations import Usage
from squall.server.logprobs import ChatLogprobs, chat_logprobs
from squall.server.messages import Request, Response, StreamingResponse
from squall.server.params import (
    chat_params,
    template_messages,
    validate,
    wants_usage,
)
from squall.server.schema import ChatBody, Message, decode
from squall.server.sse import stream
from squall.server.state import ServerState

_decoder = msgspec.json.Decoder(ChatBody)
_encode = msgspec.json.Encoder().encode


class AnswerMessage(msgspec.Struct, frozen=True, kw_only=True):
    """The assistant's message."""

    role: str = "assistant"
    content: str
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True):
    """One of the answer's choices."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class ChatAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The body of an answer that is not streamed."""

    id: str
    object: str = "chat.completion"
    created: int  # Unix seconds
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatChunks:
    """The events of a streamed answer; everything but the text is written beforehand."""

    def __init__(self, answer_id: str, created: int, model: str, *, with_usage: bool) -> None:
        meta = {"id": answer_id, "object": "chat.completion.chunk", "created": created}
        self._head = b"data: " + _encode({**meta, "model": model})[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if with_usage else b"]}\n\n"
        self._with_usage = with_usage
        self._prefixes: dict[int, bytes] = {}

    def opening(self, choice: int) -> bytes:
        return (
            b'%b{"index":%d,"delta":{"role":"assistant","content":""},'
            b'"logprobs":null,"finish_reason":null}%b' % (self._head, choice, self._tail)
        )

    def delta(self, choice: int, text: str, logprobs: tuple[Logprob, ...]) -> bytes:
        prefix = self._prefixes.get(choice)
        if prefix is None:
            prefix = b'%b{"index":%d,"delta":{"content":' % (self._head, choice)
            self._prefixes[choice] = prefix
        return b'%b%b},"logprobs":%b,"finish_reason":null}%b' % (
            prefix,
            _encode(text),
            _encode(chat_logprobs(logprobs)) if logprobs else b"null",
            self._tail,
        )

    def finish(self, choice: int, reason: str) -> bytes:
        return b'%b{"index":%d,"delta":{},"logprobs":null,"finish_reason":%b}%b' % (
            self._head,
            choice,
            _encode(reason),
            self._tail,
        )

    def usage(self, usage: Usage) -> bytes:
        return b'%b],"usage":%b}\n\n' % (self._head, _encode(usage)) if self._with_usage else b""


async def encode_messages(
    state: ServerState,
    backend: Backend,
    messages: list[Message],
    add_generation_prompt: bool = True,
) -> list[int]:
    """The ids of a chat. Raises ApiError for messages that the model's template refuses."""
    chat = template_messages(messages)

    def work() -> list[int]:
        text = backend.render_chat(chat, add_generation_prompt=add_generation_prompt)
        return backend.encode_chat(text)

    try:
        # Always off the loop: a template may compute for seconds, and another request's may be
        # doing that now, which would keep this one waiting.
        return await state.in_thread(work)
    except TemplateError as error:
        raise ApiError(400, str(error), param="messages", code="template_error") from None


async def chat_completions(state: ServerState, request: Request) -> Response | StreamingResponse:
    """Answer a chat, whole or as a stream of events."""
    backend = state.require_backend()
    body = decode(_decoder, request.body)
    state.check_model(backend, body.model)
    params, with_usage = chat_params(body), wants_usage(body)
    names = {"logprobs": "top_logprobs"}
    if body.max_completion_tokens is not None:
        names["max_tokens"] = "max_completion_tokens"
    validate(params, backend.card.vocab_size, names)
    prompt = await encode_messages(state, backend, body.messages)

    answer_id, created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
    model = backend.card.name
    if body.stream:
        chunks = ChatChunks(answer_id, created, model, with_usage=with_usage)
        return stream(state, backend, chunks, [prompt], params, "messages")
    choices, usage = await collect(state, backend, [prompt], params, "messages")
    answer = ChatAnswer(
        id=answer_id,
        created=created,
        model=model,
        usage=usage,
        choices=[
            ChatChoice(
                index,
                AnswerMessage(content=choice.text),
                None if params.logprobs is None else chat_logprobs(choice.logprobs),
                choice.finish_reason,
            )
            for index, choice in enumerate(choices)
        ],
    )
    return Response(body=_encode(answer))
