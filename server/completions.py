"""POST /v1/completions."""

import time
import uuid
from collections.abc import Sequence

import msgspec

from squall.runtime.output import Logprob
from squall.server.backend import Backend
from squall.server.collect import collect
from squall.server.errors import ApiError
from squall.server.generations import Usage
from squall.server.logprobs import CompletionLogprobs, OffsetCounter
from squall.server.messages import Request, Response, StreamingResponse
from squall.server.params import completion_params, validate, wants_usage
from squall.server.schema import CompletionBody, decode
from squall.server.sse import stream
from squall.server.state import ServerState

MAX_CHOICES = 1024  # prompts x n of one request

_decoder = msgspec.json.Decoder(CompletionBody)
_encode = msgspec.json.Encoder().encode

Prompt = str | list[int]


class CompletionChoice(msgspec.Struct, frozen=True):
    """One of the answer's choices; also of a streamed answer's chunks."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None


class CompletionAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The body of an answer that is not streamed."""

    id: str
    object: str = "text_completion"
    created: int  # Unix seconds
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunks:
    """The events of a streamed answer; ``echoes[i]`` is what choice i begins with."""

    def __init__(
        self,
        answer_id: str,
        created: int,
        model: str,
        *,
        with_usage: bool,
        echoes: Sequence[str],
    ) -> None:
        meta = {"id": answer_id, "object": "text_completion", "created": created}
        self._head = b"data: " + _encode({**meta, "model": model})[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if with_usage else b"]}\n\n"
        self._with_usage = with_usage
        self._echoes = echoes
        self._offsets = [OffsetCounter(len(echo)) for echo in echoes]

    def opening(self, choice: int) -> bytes:
        echo = self._echoes[choice]
        return self._chunk(choice, echo, b"null", b"null") if echo else b""

    def delta(self, choice: int, text: str, logprobs: tuple[Logprob, ...]) -> bytes:
        shown = b"null"
        if logprobs:
            shown = _encode(self._offsets[choice].completion_logprobs(logprobs))
        return self._chunk(choice, text, shown, b"null")

    def finish(self, choice: int, reason: str) -> bytes:
        return self._chunk(choice, "", b"null", _encode(reason))

    def usage(self, usage: Usage) -> bytes:
        return b'%b],"usage":%b}\n\n' % (self._head, _encode(usage)) if self._with_usage else b""

    def _chunk(self, choice: int, text: str, logprobs: bytes, reason: bytes) -> bytes:
        return b'%b{"index":%d,"text":%b,"logprobs":%b,"finish_reason":%b}%b' % (
            self._head,
            choice,
            _encode(text),
            logprobs,
            reason,
            self._tail,
        )


def split_prompts(prompt: str | list[str | int | list[int]]) -> list[Prompt]:
    """The request's prompts, each a text or a list of ids, none of them empty."""
    if isinstance(prompt, str):
        prompts: list[Prompt] = [prompt]
    elif all(isinstance(item, int) for item in prompt):
        prompts = [prompt]  # type: ignore[list-item]
    elif all(isinstance(item, str) for item in prompt) or all(
        isinstance(item, list) for item in prompt
    ):
        prompts = prompt  # type: ignore[assignment]
    else:
        raise ApiError(
            400,
            "a list prompt holds texts only, token ids only, or lists of token ids only",
            param="prompt",
        )
    for i, item in enumerate(prompts):
        if not item:
            which = "prompt" if len(prompts) == 1 else f"prompt[{i}]"
            raise ApiError(400, f"{which} is empty", param="prompt", code="empty_prompt")
    return prompts


async def encode_prompts(
    state: ServerState, backend: Backend, prompts: list[Prompt]
) -> list[list[int]]:
    """The prompts as ids. Raises ApiError for ids that the model does not have."""
    vocab_size = backend.card.vocab_size
    for prompt in prompts:
        if not isinstance(prompt, str):
            check_ids("prompt", prompt, vocab_size)

    def work() -> list[list[int]]:
        return [
            backend.encode_text(prompt) if isinstance(prompt, str) else prompt for prompt in prompts
        ]

    size = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
    return await state.work_on(size, work)


def check_ids(field: str, ids: list[int], vocab_size: int) -> None:
    """Raises ApiError when one of ``ids`` is outside the vocabulary."""
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        wrong = next(i for i in ids if not 0 <= i < vocab_size)
        shown = str(wrong) if abs(wrong) < 10**20 else "a number of more than 20 digits"
        raise ApiError(
            400, f"{field} holds token id {shown}; ids go from 0 to {vocab_size - 1}", param=field
        )


async def completions(state: ServerState, request: Request) -> Response | StreamingResponse:
    """Continue one or several prompts, whole or as a stream of events."""
    backend = state.require_backend()
    body = decode(_decoder, request.body)
    state.check_model(backend, body.model)
    params, with_usage = completion_params(body), wants_usage(body)
    validate(params, backend.card.vocab_size, {})
    texts = split_prompts(body.prompt)
    if len(texts) * params.n > MAX_CHOICES:
        raise ApiError(
            400, f"{len(texts)} prompts with n={params.n}: at most {MAX_CHOICES} choices",
            param="prompt",
        )  # fmt: skip
    prompts = await encode_prompts(state, backend, texts)
    echoes = [""] * (len(texts) * params.n)
    if body.echo:
        decode_ids = backend.tokenizer.decode
        shown = [t if isinstance(t, str) else decode_ids(t, skip_special=False) for t in texts]
        echoes = [text for text in shown for _ in range(params.n)]

    answer_id, created = f"cmpl-{uuid.uuid4().hex}", int(time.time())
    model = backend.card.name
    if body.stream:
        chunks = CompletionChunks(answer_id, created, model, with_usage=with_usage, echoes=echoes)
        return stream(state, backend, chunks, prompts, params, "prompt")
    choices, usage = await collect(state, backend, prompts, params, "prompt")
    answer = CompletionAnswer(
        id=answer_id,
        created=created,
        model=model,
        usage=usage,
        choices=[
            CompletionChoice(
                index,
                echo + choice.text,
                None
                if params.logprobs is None
                else OffsetCounter(len(echo)).completion_logprobs(choice.logprobs),
                choice.finish_reason,
            )
            for index, (echo, choice) in enumerate(zip(echoes, choices, strict=True))
        ],
    )
    return Response(body=_encode(answer))
