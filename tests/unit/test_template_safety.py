"""Hostile chat templates: bounded, refused, and without a trace in the parent."""

import gc
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from squall.loaders.chat_template import ChatTemplate, TemplateError

Messages = list[dict[str, Any]]


def make(source: Any, **options: Any) -> ChatTemplate:
    return ChatTemplate(source, bos_token="<s>", eos_token="</s>", **options)


USER: Messages = [{"role": "user", "content": "hi <é> 'x' & 😀"}]

BOMBS = {
    "repeat": "{{ 'a' * 10**10 }}",
    "power": "{{ 10 ** (10 ** 9) }}",
    "percent width": "{{ '%2000000000d' % 1 }}",
    "format width": "{{ '{:2000000000}'.format(1) }}",
    "center": "{{ 'a' | center(10**10) }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "indent": "{{ 'a\n' | indent(10**10) }}",
    "replace": "{% set a = 'a' * 1000000 %}{{ a.replace('a', a) }}",
    "join": "{% set a = 'a' * 1000000 %}{{ ([a] * 100000) | join(a) }}",
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "nested loops": "{% for i in range(9**5) %}{% for j in range(9**5) %}{% endfor %}{% endfor %}",
    "doubling": "{% set n = namespace(x='aa') %}{% for i in range(99) %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "doubling lists": "{% set n = namespace(x=['a']) %}{% for i in range(99) %}"
    "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "comparing lists": "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(60) %}"
    "{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x == n.y }}",
    "macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "recursive loop": "{% for x in [[1]] recursive %}{{ loop([x]) }}{% endfor %}",
    "parentheses": "{{ " + "(" * 6000 + "1" + ")" * 6000 + " }}",
    "brackets": "{{ " + "[" * 6000 + "]" * 6000 + " }}",
    "blocks": "{% if a %}" * 3000 + "{% endif %}" * 3000,
    "long chain": "{{ 1" + "+1" * 50_000 + " }}",
    "elif": "{% if a %}" + "{% elif a %}" * 20_000 + "{% endif %}",
    "output": "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
    "lipsum": "{{ lipsum(n=10**7) }}",
    "digits": "{{ 10 ** 5000 }}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_end_soon_and_cleanly(name: str) -> None:
    start = time.process_time(), os.times().children_user
    with pytest.raises(TemplateError) as caught:
        make(BOMBS[name], cpu_s=0.25).render(USER)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700
    assert time.process_time() - start[0] < 1
    assert os.times().children_user - start[1] < 3


def test_a_killed_render_does_not_spoil_the_next() -> None:
    source = "{% if bomb %}{{ 10 ** bomb }}{% endif %}{{ messages[0].content }}"
    template = make(source, cpu_s=0.3)
    for _ in range(2):
        with pytest.raises(TemplateError, match=r"took more than 0\.3 s of CPU time"):
            template.render(USER, bomb=10**9)
        assert template.render(USER) == USER[0]["content"]


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ '{x.__class__.__mro__}'.format_map({'x': ''}) }}",
        "{{ (''|attr('__class__')).mro() }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__code__.co_code }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({}) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_escapes_are_refused(source: str) -> None:
    with pytest.raises(TemplateError):
        make(source).render(USER)


def test_process_ends_with_its_template_and_sees_no_secrets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    template = make("x")
    pid = template._worker._process.pid
    proc = Path(f"/proc/{pid}/environ")
    if proc.exists():
        assert b"hf_secret" not in proc.read_bytes()
    del template
    gc.collect()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_nothing_is_left_when_the_parent_is_killed() -> None:
    code = (
        "import os, signal\n"
        "from squall.loaders.chat_template import ChatTemplate\n"
        "t = ChatTemplate('x', bos_token='', eos_token='')\n"
        "print(t._worker._process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    pid = int(result.stdout)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and _runs(pid):
        time.sleep(0.02)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    # In a container nobody may reap it: a zombie has ended.
    return not (status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] == "Z")
