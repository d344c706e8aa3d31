"""SamplingParams: ranges, messages, and that nothing heavy is imported."""

import subprocess
import sys

import msgspec
import pytest

from squall.runtime.params import ParamError, SamplingParams, mix64

VOCAB = 1000
NAN, INF = float("nan"), float("inf")

GOOD = [
    {},
    {"temperature": 0.0},
    {"temperature": 0},
    {"temperature": 100.0},
    {"top_k": -1},
    {"top_k": 2**31 - 1},
    {"top_p": 1e-9},
    {"top_p": 1},
    {"min_p": 1.0},
    {"repetition_penalty": 10.0},
    {"frequency_penalty": -2.0, "presence_penalty": 2.0},
    {"dry_multiplier": 0.8, "dry_base": 1.0, "dry_allowed_length": 0},
    {"dry_sequence_breakers": ()},
    {"logit_bias": {0: -100, 999: 100.0}},
    {"seed": -(2**63)},
    {"seed": 2**64 - 1},
    {"logprobs": 0},
    {"logprobs": 20},
    {"n": 128},
    {"stop": "x"},
    {"stop": ["a", "b"]},
    {"stop": tuple(str(i) for i in range(16))},
    {"stop_token_ids": [0, 999]},
    {"max_tokens": 1},
]

BAD = [
    *[
        (name, value)
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty")
        for value in (NAN, INF, -INF, 1e9, -3.0, 10**400, "0.5", None, True)
    ],
    *[(name, NAN) for name in ("presence_penalty", "dry_multiplier", "dry_base")],
    *[(name, INF) for name in ("presence_penalty", "dry_multiplier", "dry_base")],
    ("temperature", 100.5),
    ("temperature", -1e-9),
    ("top_k", -2),
    ("top_k", 2**31),
    ("top_k", 5.0),
    ("top_k", 10**5000),
    ("top_p", 0.0),
    ("top_p", 1.0001),
    ("min_p", 1.5),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", 10.5),
    ("presence_penalty", 2.1),
    ("dry_multiplier", -0.1),
    ("dry_base", 0.9),
    ("dry_allowed_length", -1),
    ("dry_allowed_length", 51),
    ("dry_sequence_breakers", ("",)),
    ("dry_sequence_breakers", ("x" * 65,)),
    ("dry_sequence_breakers", tuple("a" * 65)),
    ("logit_bias", {1000: 1.0}),
    ("logit_bias", {-1: 1.0}),
    ("logit_bias", {"5": 1.0}),
    ("logit_bias", {5: 100.1}),
    ("logit_bias", {5: NAN}),
    ("logit_bias", {5: "x"}),
    ("logit_bias", [1, 2]),
    ("seed", 2**64),
    ("seed", -(2**63) - 1),
    ("seed", 1.5),
    ("logprobs", 21),
    ("logprobs", -1),
    ("logprobs", True),
    ("n", 0),
    ("n", 129),
    ("stop", ("",)),
    ("stop", tuple(str(i) for i in range(17))),
    ("stop", ("x" * 1025,)),
    ("stop", ("\ud800",)),
    ("stop", (5,)),
    ("stop", 5),
    ("stop_token_ids", (1000,)),
    ("stop_token_ids", (-1,)),
    ("stop_token_ids", tuple(range(1025))),
    ("max_tokens", 0),
    ("max_tokens", -5),
    ("max_tokens", 2**31),
    ("ignore_eos", "yes"),
]


@pytest.mark.parametrize("values", GOOD, ids=str)
def test_accepted_values_survive_the_socket(values: dict) -> None:
    params = SamplingParams(**values)
    params.validate(VOCAB)
    packed = msgspec.msgpack.encode(params)
    assert msgspec.msgpack.decode(packed, type=SamplingParams) == params


@pytest.mark.parametrize(("name", "value"), BAD, ids=[f"{n}-{i}" for i, (n, _) in enumerate(BAD)])
def test_refused_values_are_named_in_one_short_line(name: str, value: object) -> None:
    with pytest.raises(ParamError) as caught:
        SamplingParams(**{name: value}).validate(VOCAB)
    error = caught.value
    assert error.param == name
    assert error.message == str(error)
    assert error.message.startswith(name)
    assert "expected" in error.message
    assert "\n" not in error.message
    assert len(error.message) < 250


def test_messages_say_what_is_accepted() -> None:
    with pytest.raises(ParamError, match=r"temperature is nan, expected a number from 0 to 100"):
        SamplingParams(temperature=NAN).validate(VOCAB)
    with pytest.raises(ParamError, match=r"holds token id 1000, expected ids from 0 to 999"):
        SamplingParams(stop_token_ids=(1000,)).validate(VOCAB)
    with pytest.raises(ParamError, match=r"bias of token 3 is 200, expected a bias from -100 to"):
        SamplingParams(logit_bias={3: 200}).validate(VOCAB)


def test_choices_have_seeds_of_their_own() -> None:
    params = SamplingParams(seed=7, n=50)
    choices = [params.choice(i) for i in range(50)]
    assert choices[0] == SamplingParams(seed=7)
    assert len({c.seed for c in choices}) == 50
    assert not {c.seed for c in choices[1:]} & {
        SamplingParams(seed=8).choice(i).seed for i in range(50)
    }
    for choice in choices:
        choice.validate(VOCAB)
    assert SamplingParams(n=2).choice(1).seed is None


def test_mix64_is_splitmix64() -> None:
    # First outputs of SplitMix64 seeded with 0, as published with the xoshiro generators.
    golden = 0x9E3779B97F4A7C15
    assert [mix64(golden * i) for i in (1, 2, 3)] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]


def test_import_is_light() -> None:
    code = "import sys, squall.runtime.params; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
