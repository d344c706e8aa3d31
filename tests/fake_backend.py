"""A deterministic model for server tests: it answers with fixed words, one word a step.

Not a test module: loaded by path, and run as a script by the tests that need a process. What a
prompt contains decides what happens: ``FOREVER`` never ends, ``FLOOD`` produces 200,000 words in
steps of 1000, ``FAIL`` breaks after two words, ``SILENT`` waits 0.3 s before its first word.
"""

import asyncio
import json
import os
import sys
import threading
import time
from dataclasses import dataclass, field

from squall.loaders.chat_template import TemplateError
from squall.loaders.errors import ModelLoadError
from squall.runtime.frontend import EmptyPrompt, EngineDead, PromptTooLong, QueueFull
from squall.runtime.messages import ModelCard
from squall.runtime.output import Delta, Logprob
from squall.runtime.params import SamplingParams
from squall.server.app import ServeOptions, serve

WORDS = ("Hello", " wörld", " 🌍", ",", ' "quoted"\n', " and", " done", ".")
TEXT = "".join(WORDS)
BOS, EOS, VOCAB = 256, 257, 258
CONTEXT = 4096


class ByteTokenizer:
    """Ids 0..255 are bytes, 256 begins and 257 ends a text."""

    vocab_size = VOCAB

    def encode(self, text, *, add_special=True, parse_special=True):
        return [BOS] * add_special + list(text.encode())

    def decode(self, ids, *, skip_special=True):
        names = {} if skip_special else {BOS: b"<s>", EOS: b"</s>"}
        return b"".join(names.get(i, b"") if i > 255 else bytes([i]) for i in ids).decode(
            errors="replace"
        )


@dataclass(eq=False)
class Generation:
    prompt: str
    prompt_tokens: int
    params: SamplingParams
    completion_tokens: int = 0
    task: asyncio.Task | None = field(default=None, repr=False)


class FakeBackend:
    """See ``squall.server.backend.Backend``."""

    def __init__(self, step: float = 0.0, max_running: int = 64) -> None:
        self.card = ModelCard(
            name="org/fake",
            created=1_700_000_000,
            format="F32 fake",
            device="cpu",
            dtype="f32",
            vocab_size=VOCAB,
            max_model_len=CONTEXT,
            kv_tokens=8192,
            max_seqs=8,
            max_queue=8,
            weight_bytes=0,
            kv_bytes=0,
        )
        self.tokenizer = ByteTokenizer()
        self.step = step
        self.max_running = max_running
        self.running: set[Generation] = set()
        self.started: list[Generation] = []
        self.cancelled: list[tuple[Generation, float]] = []  # with perf_counter
        self.dead: str | None = None
        self.closed = False
        self.threads: set[str] = set()

    def render_chat(self, messages, *, tools=None, add_generation_prompt=True):
        self.threads.add(threading.current_thread().name)
        for message in messages:
            if message["content"] == "BADTEMPLATE":
                raise TemplateError("roles must alternate", 7)
        text = "".join(f"<{m['role']}>{m['content']}\n" for m in messages)
        return text + "<assistant>" * add_generation_prompt

    def encode_chat(self, text):
        return self.tokenizer.encode(text)

    def encode_text(self, text):
        self.threads.add(threading.current_thread().name)
        return self.tokenizer.encode(text) if text else []

    def start(self, prompt_ids, params, on_delta):
        params.validate(VOCAB)
        if self.dead is not None:
            raise EngineDead(self.dead)
        if not prompt_ids:
            raise EmptyPrompt("the prompt is empty")
        if len(prompt_ids) >= CONTEXT:
            raise PromptTooLong(len(prompt_ids), CONTEXT)
        if len(self.running) + 1 > self.max_running:
            raise QueueFull("the queue is full")
        prompt = self.tokenizer.decode(prompt_ids)
        generation = Generation(prompt, len(prompt_ids), params)
        generation.task = asyncio.get_running_loop().create_task(self._run(generation, on_delta))
        self.running.add(generation)
        self.started.append(generation)
        return generation

    def cancel(self, generation):
        if generation in self.running:
            self.running.discard(generation)
            self.cancelled.append((generation, time.perf_counter()))
            generation.task.cancel()

    def unhealthy(self):
        return self.dead

    def die(self, reason="the engine stopped: exit code -9"):
        self.dead = reason

    def close(self):
        self.closed = True

    async def _run(self, generation, on_delta):
        params, prompt = generation.params, generation.prompt
        if "SILENT" in prompt:
            await asyncio.sleep(0.3)
        words, per_step = list(WORDS), 1
        if "FLOOD" in prompt:
            words, per_step = ["0123456789" * 4] * 200_000, 1000
        position = 0
        while True:
            await asyncio.sleep(self.step)
            if "FAIL" in prompt and position == 2:
                self._finish(generation)
                on_delta(Delta(0, "", (), (), "error", error="NaN in the logits"))
                return
            if "FOREVER" in prompt:
                batch, reason = [words[position % len(words)]], None
            else:
                batch = words[position : position + per_step]
                if params.max_tokens is not None:
                    batch = batch[: params.max_tokens - position]
                reason = "stop" if position + len(batch) >= len(words) else None
                if params.max_tokens is not None and position + len(batch) >= params.max_tokens:
                    reason = reason or "length"
            position += len(batch)
            generation.completion_tokens += len(batch) * params.n
            text = "".join(batch)
            for stop in params.stop:
                if stop in text:
                    text, reason = text[: text.index(stop)], "stop"
            if reason is not None:
                self._finish(generation)
            logprobs = self._logprobs(batch, params.logprobs)
            for index in range(params.n):
                on_delta(Delta(index, text, (0,) * len(batch), logprobs, reason))
            if reason is not None:
                return

    def _finish(self, generation):
        self.running.discard(generation)

    def _logprobs(self, words, top):
        if top is None:
            return ()
        return tuple(
            Logprob(
                word,
                7,
                -0.5,
                word.encode(),
                tuple(
                    Logprob(word if k == 0 else f"alt{k}", 7 + k, -0.5 - k, b"alt")
                    for k in range(top)
                ),
            )
            for word in words
        )


def run_serve(port: int, step: float, timeout: float, mode: str, seconds: float) -> int:
    """``serve`` a fake model; ``mode`` is ``""``, ``"load"`` (takes ``seconds`` to load),
    ``"fail"`` (does not load) or ``"die"`` (the engine dies after ``seconds``)."""
    backend = FakeBackend(step)

    async def load() -> FakeBackend:
        if mode == "load":
            await asyncio.sleep(seconds)
        elif mode == "fail":
            raise ModelLoadError("model.gguf: truncated")
        elif mode == "die":
            asyncio.get_running_loop().call_later(seconds, backend.die)
        return backend

    try:
        return serve(load, ServeOptions(port=port, shutdown_timeout=timeout))
    except ModelLoadError as error:
        print(f"caught: {error}", file=sys.stderr)
        return 3
    finally:
        print(f"closed={backend.closed} cancelled={len(backend.cancelled)}", flush=True)


def zygote() -> None:
    """Fork servers on request: importing everything anew for each would take seconds.

    Reads JSON lines: ``{"log": FILE, "args": [...]}`` answers the process id, ``{"wait": PID}``
    its exit code.
    """
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os._exit(run_serve(*request["args"]))
        print(pid, flush=True)


if __name__ == "__main__":
    zygote()
