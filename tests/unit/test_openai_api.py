"""The OpenAI API on a fake model, called without sockets: what is accepted, refused, answered."""

import asyncio
import importlib.util
import json
import math
import time
from pathlib import Path

import pytest

from squall.server import sse
from squall.server.errors import ApiError
from squall.server.messages import Request
from squall.server.openai import routes
from squall.server.router import Router
from squall.server.state import ServerState

_spec = importlib.util.spec_from_file_location(
    "fake_backend", Path(__file__).parents[1] / "fake_backend.py"
)
fake = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake)

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hi"}]


class Wire:
    """A ``BodyWriter`` that keeps the body."""

    def __init__(self):
        self.data = b""
        self.paused = self.aborted = False
        self.ended = asyncio.Event()
        self.keep_alive = None

    def write(self, data):
        assert data
        assert not self.ended.is_set()
        self.data += data

    def finish(self, *, keep_alive=True):
        self.keep_alive = keep_alive
        self.ended.set()

    def abort(self):
        self.aborted = True
        self.ended.set()

    def events(self):
        """The payloads; comments are dropped."""
        lines = self.data.decode().split("\n\n")
        assert lines.pop() == ""
        return [line.removeprefix("data: ") for line in lines if not line.startswith(":")]


class Client:
    """One server state and its router."""

    def __init__(self, backend=None, loopback_only=True, **state):
        self.backend = backend or fake.FakeBackend()
        self.state = ServerState(**state)
        self.state.backend = self.backend
        self.router = Router(routes(self.state), loopback_only=loopback_only)

    def send(self, method, path, body=b"", host="localhost:1234", **headers):
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.router(Request(method, path, "", host, headers, raw, "id"))

    async def post(self, path, body, **headers):
        return await self.send("POST", path, body, **headers)

    async def stream(self, path, body):
        wire = Wire()
        response = await self.post(path, {**body, "stream": True})
        assert response.status == 200, response
        response.source.attach(wire)
        async with asyncio.timeout(5):
            await wire.ended.wait()
        return wire


def run(scenario, **kwargs):
    """Run ``scenario(client)`` on a loop."""

    async def main():
        client = Client(**kwargs)
        try:
            return await scenario(client)
        finally:
            client.state.close()

    return asyncio.run(main())


def post(path, body, **kwargs):
    """(status, decoded body) of one request."""
    response = run(lambda client: client.post(path, body), **kwargs)
    return response.status, json.loads(response.body)


def stream(path, body, **kwargs):
    """(decoded chunks, wire); the stream must end with [DONE]."""
    wire = run(lambda client: client.stream(path, body), **kwargs)
    events = wire.events()
    assert events.pop() == "[DONE]"
    assert wire.keep_alive is True
    return [json.loads(event) for event in events], wire


# -- answers ---------------------------------------------------------------------------------


def test_chat_answer():
    status, answer = post(CHAT, {"model": "org/fake", "messages": HELLO})
    assert status == 200
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["model"] == "org/fake"
    assert abs(answer["created"] - time.time()) < 60
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": fake.TEXT, "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    prompt = len("<user>hi\n<assistant>") + 1
    assert answer["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": 8,
        "total_tokens": prompt + 8,
    }


def test_completion_answer():
    status, answer = post(COMPLETIONS, {"model": "default", "prompt": "hi"})
    assert status == 200
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [
        {"index": 0, "text": fake.TEXT, "logprobs": None, "finish_reason": "stop"}
    ]
    assert answer["usage"]["total_tokens"] == 3 + 8


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_max_tokens_finishes_with_length(path):
    body = {"messages": HELLO} if path == CHAT else {"prompt": "hi"}
    for name in ("max_tokens", "max_completion_tokens")[: 2 if path == CHAT else 1]:
        _, answer = post(path, {**body, name: 2})
        (choice,) = answer["choices"]
        text = choice["message"]["content"] if path == CHAT else choice["text"]
        assert (text, choice["finish_reason"]) == ("Hello wörld", "length")


def test_completions_default_to_16_tokens():
    async def scenario(client):
        await client.post(COMPLETIONS, {"prompt": "hi"})
        await client.post(CHAT, {"messages": HELLO})
        return [generation.params.max_tokens for generation in client.backend.started]

    assert run(scenario) == [16, None]


def test_chat_stream_follows_the_rules():
    chunks, _ = stream(CHAT, {"messages": HELLO})
    assert len({(c["id"], c["created"], c["model"], c["object"]) for c in chunks}) == 1
    assert chunks[0]["object"] == "chat.completion.chunk"
    assert all(set(c) == {"id", "object", "created", "model", "choices"} for c in chunks)
    deltas = [c["choices"][0]["delta"] for c in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {}
    assert all(set(delta) == {"content"} for delta in deltas[1:-1])
    assert "".join(delta["content"] for delta in deltas[1:-1]) == fake.TEXT
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * 9 + ["stop"]


def test_completion_stream():
    chunks, _ = stream(COMPLETIONS, {"prompt": "hi", "max_tokens": 3})
    assert {c["object"] for c in chunks} == {"text_completion"}
    assert "".join(c["choices"][0]["text"] for c in chunks) == "Hello wörld 🌍"
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * 3 + ["length"]


@pytest.mark.parametrize(
    ("path", "body"), [(CHAT, {"messages": HELLO}), (COMPLETIONS, {"prompt": "hi"})]
)
def test_usage_chunk_only_when_asked(path, body):
    chunks, _ = stream(path, {**body, "stream_options": {"include_usage": True}})
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 8
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    for options in ({}, {"include_usage": False}, None):
        chunks, _ = stream(path, {**body, "stream_options": options})
        assert all("usage" not in chunk and chunk["choices"] for chunk in chunks)


def test_n_choices_and_list_prompts_are_prompt_major():
    _, answer = post(COMPLETIONS, {"prompt": ["a", "bb"], "n": 2, "best_of": 2, "echo": True})
    assert [(c["index"], c["text"]) for c in answer["choices"]] == [
        (0, "a" + fake.TEXT),
        (1, "a" + fake.TEXT),
        (2, "bb" + fake.TEXT),
        (3, "bb" + fake.TEXT),
    ]
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 32, "total_tokens": 37}
    chunks, _ = stream(COMPLETIONS, {"prompt": ["a", "bb"], "n": 2, "echo": True})
    texts = dict.fromkeys(range(4), "")
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
    assert list(texts.values()) == [c["text"] for c in answer["choices"]]


def test_chat_stream_with_n_has_one_role_and_one_end_per_choice():
    chunks, _ = stream(CHAT, {"messages": HELLO, "n": 3})
    for index in range(3):
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert own[0]["delta"]["role"] == "assistant"
        assert sum("role" in choice["delta"] for choice in own) == 1
        assert "".join(choice["delta"].get("content", "") for choice in own) == fake.TEXT
        assert [choice["finish_reason"] for choice in own if choice["finish_reason"]] == ["stop"]


@pytest.mark.parametrize("prompt", [[104, 105], [[104, 105]], "hi", ["hi"]])
def test_prompt_forms(prompt):
    async def scenario(client):
        response = await client.post(COMPLETIONS, {"prompt": prompt, "echo": True})
        (generation,) = client.backend.started
        return json.loads(response.body)["choices"][0]["text"], generation

    text, generation = run(scenario)
    assert text == "hi" + fake.TEXT
    assert generation.prompt_tokens == (3 if "hi" in prompt else 2), "ids are taken as they are"


def test_chat_logprobs():
    body = {"messages": HELLO, "logprobs": True, "top_logprobs": 2, "max_tokens": 2}
    _, answer = post(CHAT, body)
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["refusal"] is None
    assert logprobs["content"][1] == {
        "token": " wörld",
        "logprob": -0.5,
        "bytes": list(" wörld".encode()),
        "top_logprobs": [
            {"token": " wörld", "logprob": -0.5, "bytes": [97, 108, 116]},
            {"token": "alt1", "logprob": -1.5, "bytes": [97, 108, 116]},
        ],
    }
    chunks, _ = stream(CHAT, body)
    shown = [c["choices"][0]["logprobs"] for c in chunks]
    assert shown[0] is None
    assert shown[-1] is None
    assert [entry for part in shown[1:-1] for entry in part["content"]] == logprobs["content"]
    _, answer = post(CHAT, {"messages": HELLO, "logprobs": True})
    assert answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_completion_logprobs():
    body = {"prompt": "hi", "logprobs": 2, "max_tokens": 4}
    _, answer = post(COMPLETIONS, body)
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs == {
        "tokens": ["Hello", " wörld", " 🌍", ","],
        "token_logprobs": [-0.5] * 4,
        "top_logprobs": [{word: -0.5, "alt1": -1.5} for word in fake.WORDS[:4]],
        "text_offset": [0, 5, 11, 13],
    }
    chunks, _ = stream(COMPLETIONS, body)
    merged = {name: [] for name in logprobs}
    for chunk in chunks[:-1]:
        for name, values in chunk["choices"][0]["logprobs"].items():
            merged[name] += values
    assert merged == logprobs


def test_logprobs_are_always_json():
    from squall.runtime.output import Logprob
    from squall.server.logprobs import OffsetCounter, chat_logprobs, finite

    assert [finite(x) for x in (-math.inf, math.nan, -1.0)] == [-9999.0, -9999.0, -1.0]
    euro = "€".encode()
    entries = [
        Logprob("�", 1, -math.inf, euro[:1]),
        Logprob("�", 2, -1.0, euro[1:]),
        Logprob("<eos>", 3, -1.0, b""),
    ]
    assert [entry.bytes for entry in chat_logprobs(entries).content] == [[0xE2], [0x82, 0xAC], None]
    legacy = OffsetCounter(10).completion_logprobs(entries)
    assert legacy.tokens == ["bytes:\\xe2", "bytes:\\x82\\xac", "<eos>"]
    assert legacy.text_offset == [10, 10, 11]


def test_stop_strings_reach_the_engine():
    for stop in ("done", ["x", "done"]):
        status, answer = post(CHAT, {"messages": HELLO, "stop": stop})
        assert status == 200
        assert answer["choices"][0]["message"]["content"] == fake.TEXT.removesuffix("done.")
        assert answer["choices"][0]["finish_reason"] == "stop"


def test_every_sampling_field_reaches_the_engine():
    given = {
        "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "n": 2,
        "seed": 11, "ignore_eos": True, "presence_penalty": 0.5, "frequency_penalty": -0.5,
        "repetition_penalty": 1.1, "dry_multiplier": 0.8, "dry_base": 1.5,
        "dry_allowed_length": 3,
    }  # fmt: skip
    more = {
        "stop": ["a", "b"], "stop_token_ids": [3], "logit_bias": {"5": -100},
        "dry_sequence_breakers": ["\n"],
    }  # fmt: skip

    async def scenario(client):
        await client.post(COMPLETIONS, {"prompt": "x", **given, **more, "logprobs": 1})
        await client.post(CHAT, {"messages": HELLO, **given, **more,
                                 "logprobs": True, "top_logprobs": 1})  # fmt: skip
        return [generation.params for generation in client.backend.started]

    for params in run(scenario):
        assert {name: getattr(params, name) for name in given} == given
        assert params.stop == ("a", "b")
        assert params.stop_token_ids == (3,)
        assert params.logit_bias == {5: -100.0}
        assert params.dry_sequence_breakers == ("\n",)
        assert params.logprobs == 1


def test_null_means_not_given_for_every_field():
    from squall.server.schema import ChatBody, CompletionBody

    for path, kind, body in (
        (CHAT, ChatBody, {"messages": HELLO}),
        (COMPLETIONS, CompletionBody, {"prompt": "hi"}),
    ):
        nulls = dict.fromkeys(set(kind.__struct_fields__) - set(body))
        assert "tools" in nulls or "suffix" in nulls
        status, answer = post(path, {**nulls, **body})
        assert status == 200, answer


def test_harmless_fields_are_accepted():
    body = {
        "messages": HELLO, "user": "me", "metadata": {"a": "b"}, "store": False,
        "safety_identifier": "x", "prompt_cache_key": "y", "service_tier": "auto",
        "response_format": {"type": "text"}, "modalities": ["text"], "tool_choice": "none",
        "stream_options": None, "stream": False,
    }  # fmt: skip
    assert post(CHAT, body)[0] == 200


def test_message_forms_reach_the_template():
    seen = []
    backend = fake.FakeBackend()
    render = backend.render_chat
    backend.render_chat = lambda messages, **kw: seen.append(messages) or render(messages, **kw)
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "annotations": [],
            "tool_calls": [
                {
                    "id": "c1",
                    "type": "function",
                    "function": {"name": "f", "arguments": '{"x": 1}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "42"},
        {"role": "user", "content": "so?", "name": "ann"},
    ]
    status, answer = post(CHAT, {"messages": messages}, backend=backend)
    assert status == 200, answer
    assert seen == [
        [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": messages[1]["content"]},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {
                        "id": "c1",
                        "type": "function",
                        "function": {"name": "f", "arguments": '{"x": 1}'},
                    }
                ],
            },
            {"role": "tool", "content": "42", "tool_call_id": "c1"},
            {"role": "user", "content": "so?", "name": "ann"},
        ]
    ]


# -- refusals --------------------------------------------------------------------------------

BAD_CHAT = [
    ({}, "messages", "required"),
    ({"messages": []}, "messages", "length >= 1"),
    ({"messages": "hi"}, "messages", "'array'"),
    ({"messages": {}}, "messages", "'array'"),
    ({"messages": [{"content": "x"}]}, "messages[0].role", "required"),
    ({"messages": [{"role": "bob", "content": "x"}]}, "messages[0].role", "bob"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "required"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "null"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "'int'"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "length >= 1"),
    ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content", "tool_calls"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages[0].content[0].text",
        "required",
    ),
    (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "x"},
                        {"type": "image_url", "image_url": {"url": "http://x"}},
                    ],
                }
            ]
        },
        "messages[0].content[1].type",
        "this model takes no images",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
        "messages[0].content[0].type",
        "audio",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "hologram"}]}]},
        "messages[0].content[0].type",
        "hologram",
    ),
    ({"messages": [{"role": "user", "content": "x", "mood": 1}]}, "messages[0].mood", "unsupp"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "required"),
    (
        {"messages": [{"role": "assistant", "content": "x", "refusal": "no"}]},
        "messages[0].refusal",
        "unsupported",
    ),
    (
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "nope"}}],
                }
            ]
        },
        "messages[0].tool_calls[0].function.arguments",
        "JSON object",
    ),
    ({"messages": [{"role": "user", "content": "BADTEMPLATE"}]}, "messages", "line 7"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "max_completion_tokens is 0"),
    ({"max_completion_tokens": 4, "max_tokens": 5}, "max_tokens", "differ"),
    ({"top_logprobs": 2}, "top_logprobs", "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "top_logprobs is 21"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs", "-1"),
    ({"logprobs": 1}, "logprobs", "'bool"),
    ({"tools": []}, "tools", "unsupported field 'tools'"),
    ({"tools": [{"type": "function"}]}, "tools", "unsupported field 'tools'"),
    ({"tool_choice": "auto"}, "tool_choice", '"none" is accepted'),
    ({"tool_choice": {"type": "function"}}, "tool_choice", '"none" is accepted'),
    ({"functions": []}, "functions", "unsupported"),
    ({"function_call": "none"}, "function_call", "unsupported"),
    ({"parallel_tool_calls": True}, "parallel_tool_calls", "unsupported"),
    ({"response_format": {"type": "json_object"}}, "response_format.type", '"text" is accepted'),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        "response_format.type",
        '"text" is accepted',
    ),
    ({"response_format": "text"}, "response_format", "'object"),
    ({"modalities": ["audio"]}, "modalities", '["text"] is accepted'),
    ({"service_tier": "priority"}, "service_tier", "priority"),
    ({"store": True}, "store", "false is accepted"),
    ({"reasoning_effort": "low"}, "reasoning_effort", "unsupported"),
    ({"verbosity": "low"}, "verbosity", "unsupported"),
    ({"audio": {}}, "audio", "unsupported"),
    ({"prediction": {}}, "prediction", "unsupported"),
    ({"web_search_options": {}}, "web_search_options", "unsupported"),
    ({"grammar": "x"}, "grammar", "unsupported field 'grammar'"),
    ({"prompt": "x"}, "prompt", "unsupported field 'prompt'"),
]

BAD_COMPLETION = [
    ({}, "prompt", "required"),
    ({"prompt": None}, "prompt", "null"),
    ({"prompt": ""}, "prompt", "empty"),
    ({"prompt": []}, "prompt", "empty"),
    ({"prompt": [[]]}, "prompt", "empty"),
    ({"prompt": ["a", ""]}, "prompt", "prompt[1] is empty"),
    ({"prompt": 5}, "prompt", "'int'"),
    ({"prompt": [1, "a"]}, "prompt", "only"),
    ({"prompt": ["a", [1]]}, "prompt", "only"),
    ({"prompt": [[1, "a"]]}, "prompt[0][1]", "'int'"),
    ({"prompt": [True]}, "prompt[0]", "'bool'"),
    ({"prompt": [-1]}, "prompt", "-1"),
    ({"prompt": [258]}, "prompt", "0 to 257"),
    ({"prompt": [[1], [10**30]]}, "prompt", "more than 20 digits"),
    ({"prompt": ["x"] * 1025}, "prompt", "at most 1024"),
    ({"suffix": "x"}, "suffix", "unsupported field 'suffix'"),
    ({"best_of": 2}, "best_of", "best_of"),
    ({"n": 3, "best_of": 2}, "best_of", "best_of"),
    ({"logprobs": True}, "logprobs", "'bool'"),
    ({"logprobs": 21}, "logprobs", "21"),
    ({"logprobs": 1, "echo": True}, "echo", "prompt"),
    ({"messages": []}, "messages", "unsupported field 'messages'"),
    ({"max_completion_tokens": 5}, "max_completion_tokens", "unsupported"),
]

BAD_SHARED = [
    ({"max_tokens": -1}, "max_tokens", "-1"),
    ({"max_tokens": 0}, "max_tokens", "0"),
    ({"max_tokens": 10**30}, "max_tokens", "expected"),
    ({"max_tokens": 1.5}, "max_tokens", "'float'"),
    ({"max_tokens": "5"}, "max_tokens", "'str'"),
    ({"max_tokens": True}, "max_tokens", "'bool'"),
    ({"temperature": -0.1}, "temperature", "-0.1"),
    ({"temperature": 1e300}, "temperature", "expected"),
    ({"temperature": "hot"}, "temperature", "'str'"),
    ({"top_p": 0}, "top_p", "expected"),
    ({"top_p": 1.01}, "top_p", "expected"),
    ({"top_k": -2}, "top_k", "-2"),
    ({"min_p": 2}, "min_p", "expected"),
    ({"n": 0}, "n", "expected"),
    ({"n": 10**6}, "n", "expected"),
    ({"stop": ""}, "stop", "expected"),
    ({"stop": ["a", ""]}, "stop", "expected"),
    ({"stop": [1]}, "stop[0]", "'int'"),
    ({"stop": ["a"] * 100}, "stop", "expected"),
    ({"stop_token_ids": [258]}, "stop_token_ids", "258"),
    ({"stop_token_ids": [-1]}, "stop_token_ids", "-1"),
    ({"seed": 2**70}, "seed", "expected"),
    ({"seed": 1.5}, "seed", "'float'"),
    ({"logit_bias": {"a": 1}}, "logit_bias", "token ids are expected"),
    ({"logit_bias": {"1e2": 1}}, "logit_bias", "token ids are expected"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", "token ids are expected"),
    ({"logit_bias": {"258": 1}}, "logit_bias", "258"),
    ({"logit_bias": {"9" * 5000: 1}}, "logit_bias", "token ids are expected"),
    ({"logit_bias": {"1": 101}}, "logit_bias", "101"),
    ({"logit_bias": {"1": "x"}}, "logit_bias[...]", "'str'"),
    ({"presence_penalty": 2.1}, "presence_penalty", "expected"),
    ({"frequency_penalty": -2.1}, "frequency_penalty", "expected"),
    ({"repetition_penalty": 0}, "repetition_penalty", "expected"),
    ({"dry_multiplier": -1}, "dry_multiplier", "expected"),
    ({"dry_base": 0}, "dry_base", "expected"),
    ({"dry_allowed_length": -1}, "dry_allowed_length", "expected"),
    ({"dry_sequence_breakers": [""]}, "dry_sequence_breakers", "expected"),
    ({"stream": "yes"}, "stream", "'str'"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unsupported"),
    (
        {"stream": True, "stream_options": {"include_obfuscation": True}},
        "stream_options.include_obfuscation",
        "false",
    ),
    ({"ignore_eos": 1}, "ignore_eos", "'int'"),
    ({"user": 5}, "user", "'int'"),
    ({"metadata": {"a": 1}}, "metadata[...]", "'int'"),
    ({"model": 5}, "model", "'int'"),
    ({"no_such_field": 5}, "no_such_field", "unsupported field 'no_such_field'"),
    ({"temperatur": None}, "temperatur", "unsupported field"),
]


def _cases():
    for bad, param, text in BAD_CHAT:
        missing = bad == {}
        yield CHAT, bad if missing else {"messages": HELLO, **bad}, param, text
    for bad, param, text in BAD_COMPLETION:
        missing = bad == {}
        yield COMPLETIONS, bad if missing else {"prompt": "hi", **bad}, param, text
    for bad, param, text in BAD_SHARED:
        yield CHAT, {"messages": HELLO, **bad}, param, text
        yield COMPLETIONS, {"prompt": "hi", **bad}, param, text


def test_bad_fields_are_a_400_that_names_them():
    async def scenario(client):
        for path, body, param, text in _cases():
            response = await client.post(path, body)
            error = json.loads(response.body)["error"]
            where = (path, str(body)[:200], error)
            assert response.status == 400, where
            assert error["type"] == "invalid_request_error", where
            assert error["param"] == param, where
            assert text in error["message"], where
            assert "\n" not in error["message"], where
            assert len(error["message"]) < 500, where
        assert not client.backend.started, "nothing refused reaches the engine"

    run(scenario)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", "empty"),
        (b"nonsense", "not valid JSON"),
        (b'{"messages": [', "not valid JSON"),
        (b'{"messages": [{"role": "user", "content": "x"}]} x', "not valid JSON"),
        (b'{"temperature": NaN}', "not valid JSON"),
        (b'{"temperature": Infinity}', "not valid JSON"),
        (b'{"temperature": 1e999}', "out of range"),
        (b'{"user": "\xff\xfe"}', "UTF-8"),
        (b'{"user": "\\ud800"}', "not valid JSON"),
        (b"\xff\xfe{\x00}\x00", "not valid JSON"),
        (b"[1, 2]", "'object'"),
        (b'"text"', "'object'"),
        (b"null", "'object'"),
        (b"[" * 100_000, "'object'"),
        (b'{"tool_choice":' + b"[" * 100_000, "nested too deeply"),
        (b'{"response_format":{"type":"text","json_schema":' + b'{"a":' * 100_000, "too deeply"),
        (b'{"seed": ' + b"9" * 100_000 + b"}", ""),
    ],
)
@pytest.mark.parametrize("path", [CHAT])
def test_bad_json_is_a_400(path, body, text):
    status, answer = post(path, body)
    assert status == 400
    assert text in answer["error"]["message"]
    assert len(answer["error"]["message"]) < 500


def test_unknown_model_is_404():
    for name in ("gpt-4", "", "ORG/FAKE"):
        status, answer = post(CHAT, {"model": name, "messages": HELLO})
        assert (status, answer["error"]["code"]) == (404, "model_not_found")
        assert "org/fake" in answer["error"]["message"]
    for name in ("org/fake", "default", "alias"):
        assert post(CHAT, {"model": name, "messages": HELLO}, aliases=("alias",))[0] == 200


def test_prompt_longer_than_the_context_gives_both_numbers():
    for path, body, param in (
        (COMPLETIONS, {"prompt": "x" * 5000}, "prompt"),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 5000}]}, "messages"),
        (COMPLETIONS, {"prompt": "x" * 5000, "stream": True}, "prompt"),
    ):
        status, answer = post(path, body)
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
        assert answer["error"]["param"] == param
        assert "4096" in answer["error"]["message"]
        assert "50" in answer["error"]["message"]


def test_full_queue_is_429_and_starts_nothing():
    async def scenario(client):
        response = await client.post(COMPLETIONS, {"prompt": ["FOREVER"] * 3})
        assert response.status == 429
        assert dict(response.headers)[b"retry-after"] == b"1"
        assert json.loads(response.body)["error"]["code"] == "queue_full"
        assert not client.backend.running, "the ones that had been started are cancelled"
        assert not client.state.running

    run(scenario, backend=fake.FakeBackend(max_running=2))


def test_engine_error_without_stream():
    status, answer = post(CHAT, {"messages": [{"role": "user", "content": "FAIL"}], "n": 2})
    assert status == 500
    assert answer["error"]["type"] == "server_error"
    assert "NaN" in answer["error"]["message"]


def test_engine_error_inside_a_stream():
    body = {"messages": [{"role": "user", "content": "FAIL"}]}
    wire = run(lambda client: client.stream(CHAT, body))
    *chunks, last = [json.loads(event) for event in wire.events()]
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * 3
    assert last == {
        "error": {
            "message": "NaN in the logits",
            "type": "server_error",
            "param": None,
            "code": "generation_failed",
        }
    }
    assert wire.keep_alive is False


def test_dead_engine_and_loading_and_draining_are_503():
    async def scenario(client):
        async def expect(code):
            for method, path in (("POST", CHAT), ("POST", COMPLETIONS), ("GET", "/v1/models")):
                response = await client.send(method, path, {"messages": HELLO})
                assert response.status == 503
                assert json.loads(response.body)["error"]["code"] == code
            health = await client.send("GET", "/health")
            assert health.status == 503
            assert json.loads(health.body)["status"] == code
            assert json.loads(health.body)["reason"]
            assert (await client.send("GET", "/version")).status == 200

        assert (await client.send("GET", "/health")).body == b'{"status":"ok"}'
        client.backend.die("exit code -9")
        await expect("engine_dead")
        client.state.backend = None
        await expect("loading")
        client.state.draining = True
        await expect("draining")

    run(scenario)


# -- streams and clients ---------------------------------------------------------------------


def test_a_slow_reader_gets_merged_chunks_and_never_blocks():
    async def scenario(client):
        wire = Wire()
        response = await client.post(CHAT, {"messages": HELLO, "n": 2, "stream": True})
        wire.paused = True
        response.source.attach(wire)
        async with asyncio.timeout(5):
            while client.backend.running:
                await asyncio.sleep(0)
        assert wire.data == b"", "nothing is written while the client is behind"
        wire.paused = False
        response.source.resume()
        assert wire.ended.is_set()
        events = wire.events()
        assert events.pop() == "[DONE]"
        choices = [json.loads(event)["choices"][0] for event in events]
        assert [c["index"] for c in choices] == [0, 0, 0, 1, 1, 1]
        assert [c["delta"] for c in choices[:3]] == [
            {"role": "assistant", "content": ""},
            {"content": fake.TEXT},
            {},
        ]

    run(scenario)


def test_a_client_too_far_behind_is_dropped(monkeypatch):
    monkeypatch.setattr(sse, "MAX_HELD_BYTES", 100_000)

    async def scenario(client):
        wire = Wire()
        body = {"prompt": "FLOOD", "max_tokens": 200_000, "stream": True}
        response = await client.post(COMPLETIONS, body)
        wire.paused = True
        response.source.attach(wire)
        async with asyncio.timeout(5):
            await wire.ended.wait()
        assert wire.aborted
        assert not client.backend.running
        assert len(client.backend.cancelled) == 1

    run(scenario)


def test_an_abandoned_stream_is_cancelled():
    async def scenario(client):
        wire = Wire()
        body = {"prompt": ["FOREVER", "FOREVER"], "stream": True}
        response = await client.post(COMPLETIONS, body)
        response.source.attach(wire)
        for _ in range(20):
            await asyncio.sleep(0)
        assert b"Hello" in wire.data
        response.source.abandon()
        sent = wire.data
        assert not client.backend.running
        assert len(client.backend.cancelled) == 2
        response.source.abandon()
        await asyncio.sleep(0.01)
        assert wire.data == sent
        assert len(client.backend.cancelled) == 2
        assert not client.state.running

    run(scenario)


@pytest.mark.parametrize("as_stream", [True, False])
def test_a_finished_request_leaves_nothing_behind(as_stream):
    async def scenario(client):
        if as_stream:
            await client.stream(COMPLETIONS, {"prompt": ["a", "b"], "n": 2})
        else:
            await client.post(COMPLETIONS, {"prompt": ["a", "b"], "n": 2})
        assert not client.state.running
        assert not client.backend.cancelled

    run(scenario)


def test_a_cancelled_handler_cancels_its_generations():
    async def scenario(client):
        task = asyncio.create_task(client.post(COMPLETIONS, {"prompt": "FOREVER", "n": 2}))
        for _ in range(10):
            await asyncio.sleep(0)
        assert len(client.backend.running) == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not client.backend.running
        assert not client.state.running

    run(scenario)


def test_fail_running_ends_streams_and_waiting_requests():
    async def scenario(client):
        wire = Wire()
        streamed = await client.post(COMPLETIONS, {"prompt": "FOREVER", "stream": True})
        streamed.source.attach(wire)
        waiting = asyncio.create_task(client.post(COMPLETIONS, {"prompt": "FOREVER"}))
        await asyncio.sleep(0.01)
        client.state.fail_running(ApiError(503, "gone", code="engine_dead"))
        assert json.loads(wire.events()[-1])["error"]["code"] == "engine_dead"
        assert (await waiting).status == 503
        assert not client.backend.running

    run(scenario)


def test_silence_is_filled_with_comments():
    async def scenario(client):
        return await client.stream(COMPLETIONS, {"prompt": "SILENT"})

    wire = run(scenario, keep_alive_comment=0.05)
    assert 2 <= wire.data.count(b": keep-alive\n\n") <= 6
    assert wire.data.startswith(b": keep-alive\n\n")
    assert "".join(json.loads(e)["choices"][0]["text"] for e in wire.events()[:-1]) == fake.TEXT


@pytest.mark.parametrize(
    ("path", "body", "thread"),
    [
        (CHAT, {"messages": HELLO}, "squall-text"),  # a template may compute for seconds
        (COMPLETIONS, {"prompt": "hi"}, "MainThread"),
        (COMPLETIONS, {"prompt": "x" * 9000}, "squall-text"),
        (COMPLETIONS, {"prompt": ["x" * 1000] * 9}, "squall-text"),
        ("/tokenize", {"text": "x" * 9000}, "squall-text"),
    ],
)
def test_long_work_leaves_the_event_loop(path, body, thread):
    backend = fake.FakeBackend()
    post(path, body, backend=backend)
    (name,) = backend.threads
    assert name.startswith(thread)


# -- routing ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("GET", "/nope", 404, None),
        ("GET", "/v1", 404, None),
        ("GET", "/v1/models/", 404, None),
        ("GET", CHAT, 405, b"OPTIONS, POST"),
        ("DELETE", CHAT, 405, b"OPTIONS, POST"),
        ("POST", "/health", 405, b"GET, HEAD, OPTIONS"),
        ("POST", "/v1/models/org/fake", 405, b"GET, HEAD, OPTIONS"),
        ("OPTIONS", CHAT, 204, b"OPTIONS, POST"),
        ("OPTIONS", "*", 204, b"GET, HEAD, OPTIONS, POST"),
        ("OPTIONS", "/nope", 404, None),
        ("HEAD", "/health", 200, None),
        ("GET", "/", 200, None),
        ("GET", "/health", 200, None),
    ],
)
def test_routes(method, path, status, allow):
    response = run(lambda client: client.send(method, path))
    assert response.status == status
    assert dict(response.headers).get(b"allow") == allow


def test_models():
    entry = {
        "id": "alias",
        "object": "model",
        "created": 1_700_000_000,
        "owned_by": "squall",
        "max_model_len": 4096,
    }

    async def scenario(client):
        listed = json.loads((await client.send("GET", "/v1/models")).body)
        assert listed["object"] == "list"
        assert listed["data"] == [entry, {**entry, "id": "org/fake"}]
        for path in ("/v1/models/org/fake", "/v1/models/org%2Ffake"):
            assert json.loads((await client.send("GET", path)).body)["id"] == "org/fake"
        missing = await client.send("GET", "/v1/models/nope")
        assert missing.status == 404

    run(scenario, aliases=("alias",))


def test_tokenize_and_detokenize():
    assert post("/tokenize", {"text": "hé"}) == (
        200,
        {"tokens": [256, 104, 195, 169], "count": 4, "max_model_len": 4096},
    )
    assert post("/tokenize", {"prompt": "h", "add_special_tokens": False})[1]["tokens"] == [104]
    assert post("/tokenize", {"text": ""})[1]["tokens"] == []
    chat = post("/tokenize", {"messages": HELLO})[1]["tokens"]
    assert bytes(chat[1:]) == b"<user>hi\n<assistant>"
    chat = post("/tokenize", {"messages": HELLO, "add_generation_prompt": False})[1]["tokens"]
    assert bytes(chat[1:]) == b"<user>hi\n"
    assert post("/detokenize", {"tokens": [256, 104, 195, 169]}) == (
        200,
        {"text": "<s>hé", "prompt": "<s>hé"},
    )
    body = {"tokens": [256, 104], "skip_special_tokens": True}
    assert post("/detokenize", body)[1]["text"] == "h"
    for path, body, param in (
        ("/tokenize", {}, "text"),
        ("/tokenize", {"text": "a", "prompt": "b"}, "text"),
        ("/tokenize", {"text": "a", "messages": HELLO}, "text"),
        ("/tokenize", {"text": "a", "x": 1}, "x"),
        ("/tokenize", {"text": "a", "add_generation_prompt": True}, "add_generation_prompt"),
        ("/tokenize", {"messages": HELLO, "add_special_tokens": True}, "add_special_tokens"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [258]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
    ):
        status, answer = post(path, body)
        assert (status, answer["error"]["param"]) == (400, param), answer


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("localhost", True),
        ("localhost:1234", True),
        ("LOCALHOST:1234", True),
        ("127.0.0.1:1234", True),
        ("[::1]:1234", True),
        ("evil.example:1234", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("192.168.1.5:1234", False),
    ],
)
def test_a_loopback_server_answers_to_loopback_names_only(host, allowed):
    response = run(lambda client: client.send("GET", "/health", host=host))
    assert response.status == (200 if allowed else 403)
    response = run(lambda client: client.send("GET", "/health", host=host), loopback_only=False)
    assert response.status == 200


def test_pages_of_other_origins_may_not_post():
    body = {"messages": HELLO}
    for origin, status in (
        ("https://evil.example", 403),
        ("null", 403),
        ("http://localhost:9999", 403),
        ("http://localhost:1234", 200),
    ):
        response = run(lambda client, o=origin: client.post(CHAT, body, origin=o))
        assert response.status == status, origin
        assert b"access-control-allow-origin" not in dict(response.headers)
