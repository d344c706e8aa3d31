"""The process that renders chat templates, and nothing else.

A chat template is a program from a model file. jinja2's sandbox keeps it from Python's internals,
but not from exhausting time or memory: one expression such as ``'a' * 10**10`` or
``'%2000000000d' % 1`` does it inside a single C call that no thread can interrupt. So templates
run here, started by ``squall.loaders.chat_template`` as a plain script: the address space is
capped, a CPU timer kills the process, no file can be opened, and the environment (tokens) is
not passed on. This file must not import squall: it starts in a tenth of a second that way.
Its arguments are the folders that hold jinja2 and markupsafe (``python -I -S`` knows no others).

Frames on the socket (file descriptor 0), both ways: ``u32 little-endian length``, then JSON.
The first request ``{"templates": {name: source}, "cpu_s": float}`` is answered with
``{"traits": {name: {...}}}``; later ones ``{"template": name, "variables": {...}, "limit": int}``
with ``{"text": str}``; either with ``{"error": str, "line": int | null}``.
"""

import codecs
import json
import socket
import struct
import sys
import traceback
from collections.abc import Iterator
from datetime import datetime
from typing import Any

if __name__ == "__main__":
    sys.path += [path for path in sys.argv[1:] if path not in sys.path]

import jinja2
import jinja2.constants
import jinja2.debug  # imported on the first error otherwise, when no file can be opened any more
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_LIMIT = 1 << 30  # bytes of address space
FILE_NAME = "<template>"  # jinja2's name for the frames of a template without a file
# Filters that take a list (of content parts) apart.
_LIST_FILTERS = {"map", "select", "reject", "selectattr", "rejectattr", "first", "last", "join"}


class GenerationTag(Extension):
    """``{% generation %}...{% endgeneration %}`` marks assistant text for training; here the body
    is rendered in a scope of its own, as transformers does."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's interface)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def raise_exception(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without jinja2's HTML escapes, with transformers' defaults."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def make_environment() -> ImmutableSandboxedEnvironment:
    """The sandbox with the conventions of transformers' ``apply_chat_template``."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationTag]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


def _is_field(node: nodes.Node | None, field: str, names: set[str]) -> bool:
    """Whether an expression is ``x.field``, ``x['field']`` or one of ``names``, maybe filtered."""
    while isinstance(node, nodes.Filter):
        node = node.node
    if isinstance(node, nodes.Getattr):
        return node.attr == field
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == field
    return isinstance(node, nodes.Name) and node.name in names


def _aliases(tree: nodes.Template, field: str) -> set[str]:
    """Names that hold a message's ``field``: set from it, or macro parameters it is passed to."""
    macros = {macro.name: [arg.name for arg in macro.args] for macro in tree.find_all(nodes.Macro)}
    calls = [call for call in tree.find_all(nodes.Call) if isinstance(call.node, nodes.Name)]
    names: set[str] = set()
    grown = True
    while grown:
        before = len(names)
        for assign in tree.find_all(nodes.Assign):
            if isinstance(assign.target, nodes.Name) and _is_field(assign.node, field, names):
                names.add(assign.target.name)
        for call in calls:
            callee = call.node.name  # type: ignore[attr-defined]
            for parameter, argument in zip(macros.get(callee, ()), call.args, strict=False):
                if _is_field(argument, field, names):
                    names.add(parameter)
        grown = len(names) > before
    return names


def _iterates_content(tree: nodes.Template) -> bool:
    names = _aliases(tree, "content")
    if any(_is_field(loop.iter, "content", names) for loop in tree.find_all(nodes.For)):
        return True
    for item in tree.find_all(nodes.Getitem):
        is_index = isinstance(item.arg, nodes.Const) and isinstance(item.arg.value, int)
        if is_index and _is_field(item.node, "content", names):
            return True
    return any(
        found.name in _LIST_FILTERS and _is_field(found.node, "content", names)
        for found in tree.find_all(nodes.Filter)
    )


def _joins_arguments(tree: nodes.Template) -> bool:
    """Whether tool-call arguments are pasted as text and never treated as an object."""
    names = _aliases(tree, "arguments")
    for found in tree.find_all(nodes.Filter):
        if found.name in ("tojson", "items", "dictsort") and _is_field(
            found.node, "arguments", names
        ):
            return False
    for member in tree.find_all(nodes.Getattr):
        if member.attr in ("items", "keys") and _is_field(member.node, "arguments", names):
            return False
    if any(_is_field(loop.iter, "arguments", names) for loop in tree.find_all(nodes.For)):
        return False
    operands: list[nodes.Node] = []
    for add in tree.find_all(nodes.Add):
        operands += [add.left, add.right]
    for concat in tree.find_all(nodes.Concat):
        operands += concat.nodes
    for output in tree.find_all(nodes.Output):
        operands += output.nodes
    return any(_is_field(operand, "arguments", names) for operand in operands)


def traits(environment: jinja2.Environment, source: str) -> dict[str, bool]:
    """What the template expects of messages, read from its syntax tree.

    ``parts``: takes ``content`` apart when it is a list. ``null_content``: tells a null ``content``
    from an absent one. ``text_arguments``: wants tool-call arguments as JSON text.
    """
    tree = environment.parse(source)
    names = _aliases(tree, "content")
    parts = _iterates_content(tree)
    # Those that take lists ask for the length of what is not a string, which a null has not.
    null = not parts and any(
        test.name == "none" and _is_field(test.node, "content", names)
        for test in tree.find_all(nodes.Test)
    )
    return {"parts": parts, "null_content": null, "text_arguments": _joins_arguments(tree)}


def describe(error: BaseException) -> dict[str, Any]:
    """An error as one line with the line of the template it came from."""
    line = error.lineno if isinstance(error, jinja2.TemplateSyntaxError) else None
    if line is None:
        for frame, number in traceback.walk_tb(error.__traceback__):
            line = number if frame.f_code.co_filename == FILE_NAME else line
    if isinstance(error, RecursionError):
        message = "nested or recursing too deeply"
    elif isinstance(error, MemoryError):
        message = "needs too much memory"
    else:
        message = " ".join(str(error).split()) or type(error).__name__
        if not isinstance(error, jinja2.TemplateError):
            message = f"{type(error).__name__}: {message}"
    return {"error": message[:500], "line": line}


def _limit_process(environment: jinja2.Environment) -> None:
    """Cap memory and forbid opening or growing files."""
    import resource

    # What is imported or read on first use must be there before: codecs, time zone, locale.
    strftime_now("%c %Z")
    for encoding in ("unicode_escape", "ascii", "latin-1"):
        codecs.lookup(encoding)
    for source in (
        "{{ strftime_now('%d') ~ raise_exception('') }}",
        "{{ ''.__class__ }}",
        "{% x %}",
    ):
        try:
            environment.from_string(source).render()
        except jinja2.TemplateError as error:
            describe(error)
    for name, value in (("RLIMIT_AS", MEMORY_LIMIT), ("RLIMIT_FSIZE", 0), ("RLIMIT_CORE", 0)):
        try:
            resource.setrlimit(getattr(resource, name), (value, value))
        except (OSError, ValueError):
            # macOS refuses RLIMIT_AS; the CPU timer still bounds what a template can allocate.
            if sys.platform.startswith("linux"):
                raise
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))


def _render(template: jinja2.Template, variables: dict[str, Any], limit: int) -> str:
    pieces: list[str] = []
    size = 0
    for piece in template.generate(**variables):
        size += len(piece)
        if size > limit:
            raise jinja2.TemplateError(f"the output is larger than {limit} characters")
        pieces.append(piece)
    return "".join(pieces)


def _requests(connection: socket.socket) -> Iterator[dict[str, Any]]:
    stream = connection.makefile("rb", buffering=1 << 16)
    while len(head := stream.read(4)) == 4:
        yield json.loads(stream.read(struct.unpack("<I", head)[0]))


def _answer(connection: socket.socket, reply: dict[str, Any]) -> None:
    data = json.dumps(reply).encode()
    connection.sendall(struct.pack("<I", len(data)) + data)


def main() -> None:
    import signal

    connection = socket.socket(fileno=0)
    environment = make_environment()
    templates: dict[str, jinja2.Template] = {}
    cpu_s = 0.0
    _limit_process(environment)
    # ITIMER_PROF counts CPU time, so a busy machine never makes an honest template fail; its
    # signal's default action ends the process even inside a C function.
    for request in _requests(connection):
        cpu_s = request.get("cpu_s", cpu_s)
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        reply: dict[str, Any]
        try:
            if "templates" in request:
                reply = {"traits": {}}
                for name, source in request["templates"].items():
                    reply["traits"][name] = traits(environment, source)
                    templates[name] = environment.from_string(source)
            else:
                template = templates[request["template"]]
                reply = {"text": _render(template, request["variables"], request["limit"])}
        except Exception as error:
            reply = describe(error)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _answer(connection, reply)


if __name__ == "__main__":
    main()
