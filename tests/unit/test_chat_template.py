"""Chat templates: equal to transformers, clear errors, found where they are."""

import copy
import json
import threading
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from squall.loaders.chat_template import (
    SOURCE_LIMIT,
    ChatTemplate,
    TemplateError,
    load_chat_template,
    read_template_file,
    special_tokens,
)
from squall.loaders.errors import ModelLoadError

Messages = list[dict[str, Any]]


def make(source: Any, **options: Any) -> ChatTemplate:
    return ChatTemplate(source, bos_token="<s>", eos_token="</s>", **options)


USER: Messages = [{"role": "user", "content": "hi <é> 'x' & 😀"}]
TURNS: Messages = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": " one\n"},
    {"role": "assistant", "content": "two", "reasoning": "why"},
    {"role": "user", "content": "three"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells <b>weather</b> & 'more' in Å",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CALLS: Messages = [
    {"role": "user", "content": "w?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"type": "function", "function": {"name": "weather", "arguments": {"city": "Å"}}}
        ],
    },
    {"role": "tool", "name": "weather", "content": "12"},
]
PARTS: Messages = [
    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
]

CHATML = """{% for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}
{{ '<|im_start|>system\\nDefault.<|im_end|>\\n' }}
    {%- endif %}
    {{ '<|im_start|>' + message['role'] + '\\n' + message.get('content', '') + '<|im_end|>\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

HEADERS = """{{- bos_token }}
{%- if tools is not none %}
Tools: {% for t in tools %}{{ t | tojson(indent=4) }}{{ "\\n\\n" }}{% endfor %}
{%- endif %}
{% for m in messages %}
  {%- set text = '<|h|>' + m.role + '<|/h|>' %}
  {%- if m.tool_calls %}
    {%- for c in m.tool_calls %}
      {%- set call = c.function %}
{{ text }}{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}{{ eos_token }}
    {%- endfor %}
  {%- else %}{{ text + m['content'] | trim + eos_token }}{% endif %}
{% endfor %}
{%- if not add_generation_prompt is defined or add_generation_prompt %}<|h|>assistant{% endif %}"""

INST = """{% set ns = namespace(first=true) %}{{ bos_token }}
{%- for m in messages if m.role != 'system' %}
  {%- if m.role == 'user' %}
    {%- if ns.first and messages[0].role == 'system' %}
      {%- set ns.first = false %}
[INST] {{ messages[0].content ~ '\\n\\n' ~ m.content.strip() }} [/INST]
    {%- else %}[INST] {{ m.content }} [/INST]{% endif %}
  {%- elif m.content %}{% generation %} {{ m.content }}{{ eos_token }}{% endgeneration %}{% endif %}
  {%- if loop.index > 8 %}{% break %}{% endif %}
{%- endfor %}"""

PARTED = """{%- macro show(content) %}
  {%- if content is string %}{{ content }}
  {%- else %}{% for p in content %}{{ '[' ~ p['text'] ~ ']' }}{% endfor %}{% endif %}
{%- endmacro %}
{%- for m in messages %}<{{ m.role }}>{{ show(m.content) if m.content is defined }}
{{ m.reasoning_content or m.thinking }}
{% endfor %}{{ strftime_now('%Y-%m-%d') }} {{ date_string }} {{ tools | length if tools }}"""

CASES = {"user": USER, "turns": TURNS, "calls": CALLS, "parts": PARTS}


def by_transformers(source: str, messages: Messages, tools: Any, prompt: bool) -> str:
    """What ``apply_chat_template`` renders, with the variables that ours adds."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()),
        bos_token="<s>",
        eos_token="</s>",
    )
    text = tokenizer.apply_chat_template(
        messages,
        tools=tools,
        chat_template=source,
        add_generation_prompt=prompt,
        tokenize=False,
        date_string=datetime.now().strftime("%d %b %Y"),
    )
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize(
    ("source", "cases"),
    [
        (CHATML, ["user", "turns", "calls"]),
        (HEADERS, ["user", "turns", "calls"]),
        (INST, ["user", "turns", "calls"]),
        (PARTED, ["user", "turns", "calls", "parts"]),
    ],
    ids=["chatml", "headers", "inst", "parted"],
)
def test_equal_to_transformers(source: str, cases: list[str]) -> None:
    template = make(source)
    for case in cases:
        for tools in (None, TOOLS):
            for prompt in (True, False):
                given = copy.deepcopy(CASES[case])
                ours = template.render(given, tools=tools, add_generation_prompt=prompt)
                assert ours == by_transformers(source, CASES[case], tools, prompt)
                assert given == CASES[case]


def test_json_arguments_become_objects_or_stay_text() -> None:
    as_text: Messages = copy.deepcopy(CALLS)
    as_text[1]["tool_calls"][0]["function"]["arguments"] = '{"city": "Å"}'
    assert make(HEADERS).render(as_text) == make(HEADERS).render(CALLS)
    loop = "{% for m in messages %}{% for c in m.tool_calls or [] %}%s{% endfor %}{% endfor %}"
    pasted = make(loop.replace("%s", "{{ c.function.name + c['function']['arguments'] }}"))
    assert pasted.render(CALLS) == pasted.render(as_text) == 'weather{"city": "Å"}'
    aliased = make(loop.replace("%s", "{% set a = c.function.arguments %}{{ '' ~ a }}"))
    assert aliased.render(CALLS) == '{"city": "Å"}'
    items = make(
        loop.replace("%s", "{% for k, v in c.function.arguments.items() %}{{ k }}{% endfor %}")
    )
    assert items.render(as_text) == "city"
    as_text[1]["tool_calls"][0]["function"]["arguments"] = ""
    assert make(loop.replace("%s", "{{ c.function.arguments | tojson }}")).render(as_text) == "{}"
    for bad in ("{", "[1]", "[" * 5000):
        as_text[1]["tool_calls"][0]["function"]["arguments"] = bad
        with pytest.raises(
            TemplateError, match=r"messages\[1\]\.tool_calls\[0\]\.function\.arguments: expected"
        ):
            items.render(as_text)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "text"),
        ("{% for m in messages %}{{ m['content'] | trim }}{% endfor %}", "text"),
        (
            "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}",
            "parts",
        ),
        (
            "{% set c = messages[0]['content'] %}{% for p in c %}{{ p.text }}{% endfor %}",
            "parts",
        ),
        ("{{ messages[0]['content'][0]['text'] }}", "parts"),
        ("{{ messages[0].content | map(attribute='text') | join }}", "parts"),
        (PARTED, "parts"),
        (CHATML, "text"),
    ],
)
def test_content_format(source: str, expected: str) -> None:
    assert make(source).content_format == expected


def test_parts_are_joined_for_text_templates() -> None:
    template = make("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert template.render(PARTS) == "a\nb"
    assert (
        template.render([{"role": "user", "content": ["a", {"type": "text", "text": "c"}]}])
        == "a\nc"
    )
    image: Messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]
    with pytest.raises(TemplateError, match=r"messages\[0\]\.content\[0\]: 'image_url' given"):
        template.render(image)


def test_null_content() -> None:
    null: Messages = [{"role": "assistant", "content": None}]
    assert make("{{ messages[0].content }}|{{ 'content' in messages[0] }}").render(null) == "|False"
    # A template that asks for none gets it: absent is not none in jinja2.
    assert make("{{ messages[0].content is none }}").render(null) == "True"


def test_tool_use_template_and_variables() -> None:
    template = make(
        {"default": "plain {{ x }}{{ eos_token }}", "tool_use": "tools {{ tools | length }}"}
    )
    assert template.render(USER, x=1) == "plain 1</s>"
    assert template.render(USER, tools=[]) == "plain </s>"
    assert template.render(USER, tools=TOOLS) == "tools 1"
    assert template.render(USER, eos_token="E") == "plain E"
    with pytest.raises(TemplateError, match="variable raise_exception is reserved"):
        template.render(USER, raise_exception=1)
    with pytest.raises(TemplateError, match="no template is named 'default', found tool_use"):
        make({"tool_use": ""})


def test_tokens_that_a_model_lacks_are_undefined() -> None:
    template = ChatTemplate(
        "{{ bos_token is defined }}{{ unk_token }}", bos_token=None, eos_token="", unk_token="u"
    )
    assert template.render(USER) == "Falseu"


@pytest.mark.parametrize(
    ("source", "line", "message"),
    [
        ("a\n{% for m in messages %}", 2, "Unexpected end of template"),
        ("a\n\n{{ messages | nope }}", 3, "No filter named 'nope'"),
        ("{# c #}\n{{ x.y.z }}", 2, "'x' is undefined"),
        ("\n\n{{ raise_exception('no\nsystem role') }}", 3, "no system role"),
        ("{{ messages[0].content + 1 }}", 1, "TypeError: can only concatenate str"),
        ("{% macro f(x) %}\n{{ x.a.b }}\n{% endmacro %}\n{{ f({}) }}", 2, "no attribute 'a'"),
    ],
)
def test_errors_name_the_line(source: str, line: int, message: str) -> None:
    with pytest.raises(TemplateError) as caught:
        make(source).render(USER)
    assert caught.value.line == line
    assert str(caught.value).startswith(f"chat template, line {line}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("messages", "variables", "message"),
    [
        ([], {}, "list of messages is empty"),
        (["hi"], {}, r"messages\[0\]: expected an object, found 'hi'"),
        ([{"role": "user", "content": "\ud800"}], {}, "cannot be passed on"),
    ],
)
def test_bad_input(messages: Any, variables: dict[str, Any], message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        make("{{ messages[0].content }}").render(messages, **variables)


def test_values_that_are_not_json_are_inert() -> None:
    assert make("{{ x }} {{ y.z }}").render(USER, x=object(), y={"z": 1}) == "<object> 1"


def test_source_size_is_bounded() -> None:
    with pytest.raises(TemplateError, match="longer than"):
        make("a" * (SOURCE_LIMIT + 1))


def test_large_conversation() -> None:
    messages = [{"role": "user", "content": "word " * 10_000}] * 60
    text = make("{% for m in messages %}{{ m.content }}{% endfor %}").render(messages)
    assert text == "word " * 600_000


def test_renders_from_many_threads() -> None:
    template = make("{{ messages[0].content }}")
    results: list[bool] = []

    def work(number: int) -> None:
        for i in range(20):
            text = f"{number}/{i}"
            results.append(template.render([{"role": "user", "content": text}]) == text)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 160


def test_precedence(tmp_path: Path) -> None:
    def put(name: str, content: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    assert load_chat_template(None) is None
    assert load_chat_template(tmp_path, embedded="gguf") == "gguf"
    put("processor_config.json", {"chat_template": "processor"})
    assert load_chat_template(tmp_path, embedded="gguf") == "processor"
    put("chat_template.json", {"chat_template": "json"})
    assert load_chat_template(tmp_path) == "json"
    put("tokenizer_config.json", {"bos_token": "<s>"})
    assert load_chat_template(tmp_path) == "json"
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    put("tokenizer_config.json", {"chat_template": named})
    assert load_chat_template(tmp_path) == {"default": "d", "tool_use": "t"}
    put("chat_template.jinja", "jinja")
    assert load_chat_template(tmp_path) == "jinja"
    put("additional_chat_templates/tool_use.jinja", "tools")
    assert load_chat_template(tmp_path) == {"default": "jinja", "tool_use": "tools"}
    flag, explicit = put("flag.json", {"chat_template": "flag"}), put("my.jinja", "explicit")
    assert load_chat_template(tmp_path, chat_template=flag) == "flag"
    assert load_chat_template(tmp_path, chat_template=flag, jinja_explicit=explicit) == "explicit"


@pytest.mark.parametrize("value", [3, [], [{"name": "default"}], ["x"], {"default": 1}, {}])
def test_bad_template_entry(tmp_path: Path, value: object) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    with pytest.raises(ModelLoadError, match=r"tokenizer_config\.json: chat_template: expected"):
        load_chat_template(tmp_path)


def test_bad_template_files(tmp_path: Path) -> None:
    (tmp_path / "a.jinja").write_bytes(b"\xff")
    (tmp_path / "b.json").write_text("{}")
    for name, message in (("a.jinja", "not UTF-8"), ("b.json", "missing"), ("c.jinja", "cannot")):
        with pytest.raises(ModelLoadError, match=message):
            read_template_file(tmp_path / name)


def test_special_tokens(tmp_path: Path) -> None:
    assert special_tokens(tmp_path) == {}
    config = {
        "bos_token": {"content": "<s>", "lstrip": False},
        "eos_token": "</s>",
        "unk_token": None,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert special_tokens(tmp_path) == {"bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": 3}))
    with pytest.raises(ModelLoadError, match="eos_token: expected a string, found 3"):
        special_tokens(tmp_path)
