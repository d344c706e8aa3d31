"""Chat templates: found, checked, and rendered in a process of their own.

The conventions are those of transformers' ``apply_chat_template`` (jinja2 with ``trim_blocks``,
``lstrip_blocks``, ``tojson`` without HTML escapes, ``raise_exception``, ``strftime_now``, loop
controls and generation tags), so the text is the one the model was trained on. A template comes
with a model and may be hostile: see ``template_worker`` for how its time, memory and reach are
bounded. A render costs about 0.1 ms (a round trip over a socket) on top of jinja2's own time.
"""

import importlib.util
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from squall.loaders.errors import ModelLoadError
from squall.loaders.hf_config import read_json, shorten

TemplateSource = str | Mapping[str, str]
"""A template, or several by name: ``default``, and ``tool_use`` for requests with tools."""

SOURCE_LIMIT: Final = 1 << 20  # characters; the longest published template has some 40,000
_MIN_OUTPUT_LIMIT: Final = 8 << 20  # characters; four times the request if that is more
_START_S: Final = 60.0  # wall-clock limits, only against a machine that hangs
_RENDER_S: Final = 30.0
_RESERVED: Final = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"}
)
_REASONING: Final = ("reasoning_content", "thinking", "reasoning")


class TemplateError(Exception):
    """A chat template, or what was given to it, cannot be rendered; one line. ``line`` is the
    template's line when known, and is then part of the message."""

    def __init__(self, message: str, line: int | None = None) -> None:
        where = "chat template" if line is None else f"chat template, line {line}"
        super().__init__(f"{where}: {message}")
        self.line = line


class _Worker:
    """The child process and its socket; ``ask`` is one request and its reply."""

    def __init__(self, templates: Mapping[str, str], cpu_s: float) -> None:
        self._cpu_s = cpu_s
        ours, theirs = socket.socketpair()
        folders = []
        for package in ("jinja2", "markupsafe"):
            spec = importlib.util.find_spec(package)
            if spec is None or spec.origin is None:
                raise TemplateError(f"the Python package {package} is not installed")
            folders.append(str(Path(spec.origin).parents[1]))
        script = str(Path(__file__).with_name("template_worker.py"))
        keep = {k: v for k, v in os.environ.items() if k in ("TZ", "LANG", "LC_ALL", "LC_TIME")}
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", script, *folders],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=keep,
                start_new_session=True,  # a Ctrl-C at the terminal is not for it
            )
        self._socket, self._process, self._pid = ours, process, os.getpid()
        self.stop = weakref.finalize(self, _stop, process, ours, os.getpid())
        request = msgspec.json.encode({"templates": dict(templates), "cpu_s": cpu_s})
        try:
            self.traits: dict[str, dict[str, bool]] = self.ask(request, _START_S)["traits"]
        except TemplateError:
            self.stop()
            raise

    @property
    def usable(self) -> bool:
        return self.stop.alive and self._pid == os.getpid()  # not across a fork

    def ask(self, request: bytes, timeout_s: float) -> dict[str, Any]:
        """Send a request; the reply, or ``TemplateError`` if it is one or the process died."""
        try:
            self._socket.settimeout(timeout_s)
            self._socket.sendall(struct.pack("<I", len(request)) + request)
            reply = msgspec.json.decode(self._receive())
        except TimeoutError:
            self.stop()
            raise TemplateError(f"no answer within {timeout_s:g} s") from None
        except (OSError, EOFError):
            raise TemplateError(self._last_words()) from None
        except msgspec.DecodeError:
            raise TemplateError("the output is not valid Unicode") from None
        if "error" in reply:
            raise TemplateError(reply["error"], reply["line"])
        return dict(reply)

    def _receive(self) -> bytearray:
        """One frame; in a single system call when it is short."""
        data = bytearray()
        needed = 4
        while len(data) < needed:
            piece = self._socket.recv(min(max(1 << 16, needed - len(data)), 1 << 20))
            if not piece:
                raise EOFError
            data += piece
            if len(data) >= 4:
                needed = 4 + struct.unpack_from("<I", data)[0]
        del data[:4]
        return data

    def _last_words(self) -> str:
        try:
            code = self._process.wait(5)
        except subprocess.TimeoutExpired:
            code = 0
        self.stop()
        if code == -signal.SIGPROF:
            return f"took more than {self._cpu_s:g} s of CPU time and was stopped"
        return f"its process ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}"


def _stop(process: subprocess.Popen[bytes], connection: socket.socket, pid: int) -> None:
    connection.close()
    if pid == os.getpid():
        process.kill()
        process.wait()


class ChatTemplate:
    """A chat template ready to render.

    ``content_format`` says what the template makes of a list of content parts: ``"parts"`` takes
    it as it is, ``"text"`` wants a string, so text parts are joined by newlines for it.
    Thread-safe; renders of one template run one at a time. ``cpu_s`` bounds a single render.
    Raises ``TemplateError`` for a template that does not compile.
    """

    def __init__(
        self,
        source: TemplateSource,
        *,
        bos_token: str | None,
        eos_token: str | None,
        unk_token: str | None = None,
        cpu_s: float = 2.0,
    ) -> None:
        self._templates = {"default": source} if isinstance(source, str) else dict(source)
        if "default" not in self._templates:
            names = ", ".join(self._templates) or "nothing"
            raise TemplateError(f"no template is named 'default', found {names}")
        for text in self._templates.values():
            if len(text) > SOURCE_LIMIT:
                raise TemplateError(f"longer than the {SOURCE_LIMIT} characters accepted")
        tokens = {"bos_token": bos_token, "eos_token": eos_token, "unk_token": unk_token}
        self._tokens = {name: token for name, token in tokens.items() if token is not None}
        self._cpu_s = cpu_s
        self._lock = threading.Lock()
        self._worker = self._start()
        self._traits = self._worker.traits

    @property
    def content_format(self) -> Literal["parts", "text"]:
        return "parts" if self._traits["default"]["parts"] else "text"

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt for a conversation.

        ``messages`` have ``role`` and ``content`` (a string, null, or a list of parts), and may
        have ``tool_calls`` whose arguments are JSON text, as the OpenAI API sends them, or
        objects; the template gets the form it works with. ``variables`` are passed on and may
        replace ``bos_token`` and the like. Raises ``TemplateError``, also for a message that the
        template cannot take.
        """
        reserved = _RESERVED.intersection(variables)
        if reserved:
            raise TemplateError(f"variable {min(reserved)} is reserved")
        if not messages:
            raise TemplateError("the list of messages is empty")
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        traits = self._traits[name]
        values = {
            **self._tokens,
            "date_string": datetime.now().strftime("%d %b %Y"),
            **variables,
            "messages": [_prepare(m, f"messages[{i}]", traits) for i, m in enumerate(messages)],
            "tools": list(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            body = msgspec.json.encode(values, enc_hook=_placeholder)
        except (TypeError, ValueError, RecursionError) as error:
            message = " ".join(str(error).split()) or "nested too deeply"
            raise TemplateError(f"messages or variables cannot be passed on: {message}") from None
        limit = max(_MIN_OUTPUT_LIMIT, 4 * len(body))
        request = b'{"template":"%b","limit":%d,"variables":%b}' % (name.encode(), limit, body)
        with self._lock:
            if not self._worker.usable:
                self._worker = self._start()
            return str(self._worker.ask(request, _RENDER_S)["text"])

    def close(self) -> None:
        """End the process; the next render would start another. Also done when collected."""
        with self._lock:
            self._worker.stop()

    def _start(self) -> _Worker:
        return _Worker(self._templates, self._cpu_s)


def _placeholder(value: object) -> str:
    """What a template sees of a value that is not JSON, such as a decoded image."""
    return f"<{type(value).__name__}>"


def _prepare(message: Mapping[str, Any], where: str, traits: Mapping[str, bool]) -> dict[str, Any]:
    """A message in the form the template works with.

    Null fields are dropped, as transformers does: most templates fail on them or print ``None``.
    """
    if not isinstance(message, Mapping):
        raise TemplateError(f"{where}: expected an object, found {shorten(message)}")
    result = {key: value for key, value in message.items() if value is not None}
    if "content" in message and message["content"] is None and traits["null_content"]:
        result["content"] = None
    content = result.get("content")
    if isinstance(content, (list, tuple)) and not traits["parts"]:
        result["content"] = "\n".join(
            _part_text(part, f"{where}.content[{i}]") for i, part in enumerate(content)
        )
    if result.get("tool_calls"):
        result["tool_calls"] = [
            _prepare_call(call, f"{where}.tool_calls[{i}]", traits["text_arguments"])
            for i, call in enumerate(result["tool_calls"])
        ]
    # The names that reasoning goes by; templates read the first two.
    reasoning = next((result[key] for key in _REASONING if key in result), None)
    if reasoning is not None:
        result = {"thinking": reasoning, **result, "reasoning_content": reasoning}
    return result


def _part_text(part: object, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else part
    raise TemplateError(f"{where}: {shorten(kind)} given, this model's template takes text only")


def _prepare_call(call: Any, where: str, as_text: bool) -> dict[str, Any]:
    """A tool call with its arguments as JSON text or as an object."""
    if not isinstance(call, Mapping):
        raise TemplateError(f"{where}: expected an object, found {shorten(call)}")
    inner = call.get("function")
    if isinstance(inner, Mapping):
        return {**call, "function": _prepare_call(inner, f"{where}.function", as_text)}
    arguments = call.get("arguments")
    if isinstance(arguments, str) and not as_text:
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise TemplateError(f"{where}.arguments: expected a JSON object as text")
        return {**call, "arguments": arguments}
    if isinstance(arguments, Mapping) and as_text:
        return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return dict(call)


def read_template_file(path: Path) -> TemplateSource:
    """A template file: ``.json`` with a ``chat_template`` key, anything else is the template."""
    if path.suffix == ".json":
        source = _from_json(path)
        if source is None:
            raise ModelLoadError(f"{path}: chat_template: missing, and needed")
        return source
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelLoadError(f"{path}: not UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise ModelLoadError(f"{path}: cannot be read: {error.strerror}") from None
    return text


def _from_json(path: Path) -> TemplateSource | None:
    value = read_json(path).get("chat_template")
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        entries = [(e.get("name"), e.get("template")) for e in value if isinstance(e, dict)]
        if len(entries) == len(value) and all(isinstance(x, str) for e in entries for x in e):
            return {str(name): str(text) for name, text in entries}
    if isinstance(value, dict) and value and all(isinstance(x, str) for x in value.values()):
        return value
    raise ModelLoadError(
        f"{path}: chat_template: expected a string or a list of {{name, template}} objects, "
        f"found {shorten(value)}"
    )


def load_chat_template(
    folder: Path | None,
    *,
    chat_template: Path | None = None,
    jinja_explicit: Path | None = None,
    embedded: str | None = None,
) -> TemplateSource | None:
    """Find the chat template; the first that exists of

    1. ``jinja_explicit`` and 2. ``chat_template``: files the user named,
    3. the folder's ``chat_template.jinja`` (with ``additional_chat_templates/*.jinja``),
       ``tokenizer_config.json``, ``chat_template.json``, ``processor_config.json``,
    4. ``embedded``: the one in a GGUF file.

    None when there is none: such a model takes plain prompts only. Raises ``ModelLoadError`` for
    a file that cannot be read.
    """
    for path in (jinja_explicit, chat_template):
        if path is not None:
            return read_template_file(path)
    if folder is None:
        return embedded
    if (folder / "chat_template.jinja").is_file():
        source = read_template_file(folder / "chat_template.jinja")
        extra = sorted((folder / "additional_chat_templates").glob("*.jinja"))
        if not extra:
            return source
        named = {path.stem: str(read_template_file(path)) for path in extra}
        return {**named, "default": str(source)}
    for file in ("tokenizer_config.json", "chat_template.json", "processor_config.json"):
        if (folder / file).is_file():
            found = _from_json(folder / file)
            if found is not None:
                return found
    return embedded


def special_tokens(folder: Path) -> dict[str, str]:
    """``bos_token``, ``eos_token``, ``unk_token`` as ``tokenizer_config.json`` names them (a string
    or an object with ``content``), those that are there."""
    path = folder / "tokenizer_config.json"
    data = read_json(path) if path.is_file() else {}
    tokens: dict[str, str] = {}
    for name in ("bos_token", "eos_token", "unk_token"):
        value = data.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if text is None:
            continue
        if not isinstance(text, str):
            raise ModelLoadError(f"{path}: {name}: expected a string, found {shorten(value)}")
        tokens[name] = text
    return tokens
