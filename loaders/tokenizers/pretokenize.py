"""Which pre-tokenizer each ``tokenizer.ggml.pre`` of a GGUF file names.

The names are llama.cpp's, the regexes those of the models' own ``tokenizer.json`` in the form
llama.cpp applies them; where its result differs from the original's, its result is what is meant.
"""

from dataclasses import dataclass

from squall.loaders.tokenizers.split import (
    DigitGroups,
    LeadingDigitGroups,
    Regex,
    Splitter,
    Stage,
    TrailingSpace,
)


@dataclass(frozen=True)
class PreTokenizer:
    """One row of the table.

    ``ignore_merges``: a word that is itself a vocabulary entry is not built by merges.
    ``add_bos``: the default when the file has no ``add_bos_token``.
    ``byte_level``: words go through GPT-2's byte alphabet; otherwise spaces become U+2581 and
    characters that are no entry fall back to ``<0xXX>`` entries.
    ``gemma``: Gemma 4's exceptions: a run of newlines that is an entry is taken whole, and BOS is
    added whatever the file says.
    """

    split: Splitter
    ignore_merges: bool = False
    add_bos: bool = False
    byte_level: bool = True
    gemma: bool = False


# Parts that many regexes share. English contractions, whatever their case:
_SUFFIX = r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])"
_WORD = r"[^\r\n\p{L}\p{N}]?[\p{L}]+"
_WORD_MARKS = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SIGNS_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_LINES = r"\s*[\r\n]+"
_SPACES = r"\s+(?!\S)|\s+"
_DIGIT, _DIGITS3 = r"[\p{N}]", r"[\p{N}]{1,3}"


def _cased(upper: str, lower: str, suffix: str) -> str:
    """Words as runs of upper (or uncased) then lower (or uncased) letters."""
    lead = r"[^\r\n\p{L}\p{N}]?"
    return f"{lead}[{upper}]*[{lower}]+{suffix}|{lead}[{upper}]+[{lower}]*{suffix}"


# The stand-in of \p{L} alone is every letter above ASCII, which llama.cpp takes as caseless.
_UPPER, _LOWER = "A-Z\xd2", "a-z\xd2"

_GPT2 = Regex(
    r"'(?:[stmd]|re|ve|ll)| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|" + _SPACES,
)
_LLAMA3 = Regex("|".join((_SUFFIX, _WORD, _DIGITS3, _SIGNS, _LINES, _SPACES)))
_QWEN2 = Regex("|".join((_SUFFIX, _WORD, _DIGIT, _SIGNS, _LINES, _SPACES)))
_EACH_DIGIT = Regex(_DIGIT)
_EACH_3_DIGITS = Regex(_DIGITS3)
_NEWLINES = Regex(r"[^\n]+|\n+", wide=True)
_CJK = Regex("[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", wide=True)
_CJK_HANGUL = Regex("[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", wide=True)
_EACH_NEWLINE = Regex(r"[\r\n]", wide=True)
_ASCII_SIGN_WORD = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
_LATER_WORD = r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
_DEEPSEEK3 = Regex(
    "|".join((_ASCII_SIGN_WORD, _LATER_WORD, r" ?[\p{P}\p{S}]+[\r\n]*", _LINES, _SPACES))
)
_POEM = Regex(" ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+", wide=True)

# Letters of the cased scripts (and their compatibility forms) as DeepSeek LLM lists them.
_DEEPSEEK_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1"
    "\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd"
    "\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d"
    "\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec"
    "\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b"
    "\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787"
    "\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_AFMOE_SCRIPTS = Regex(
    "[\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf"
    "\u0e40-\u0e7f\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af"
    "\u1100-\u11ff]+",
    wide=True,
)
_YOUTU_SCRIPTS = Regex(
    "[\uac00-\ud7a3\u3131-\u318e]+"
    "|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
    "|[\u3105-\u312f]+|[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    wide=True,
)
_JAIS2_SPACES = "|".join(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4))


def _cut(*stages: Stage, han: bool = False) -> Splitter:
    return Splitter(stages, han)


def _joined(*alternatives: str) -> Regex:
    return Regex("|".join(alternatives))


_FAMILIES: tuple[tuple[str, PreTokenizer], ...] = (
    (
        "default",
        PreTokenizer(
            _cut(
                Regex(r"[\p{P}$+<=>^~|]+"),
                _GPT2,
                Regex(r"[\p{N}]+"),
                Regex("[0-9][0-9][0-9]", wide=True),
            )
        ),
    ),
    (
        "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
        PreTokenizer(_cut(_LLAMA3), ignore_merges=True, add_bos=True),
    ),
    ("dbrx smaug-bpe chatglm-bpe", PreTokenizer(_cut(_LLAMA3))),
    ("glm4 glm5", PreTokenizer(_cut(_LLAMA3), ignore_merges=True)),
    (
        "minicpm5",
        PreTokenizer(
            _cut(_EACH_3_DIGITS, _joined(_SUFFIX, _WORD, r"[\p{N}]+", _SIGNS, _LINES, _SPACES)),
            ignore_merges=True,
        ),
    ),
    (
        "jais-2",
        PreTokenizer(
            _cut(
                _joined(
                    *(_SUFFIX, _WORD, _DIGITS3, _SIGNS, _LINES),
                    *(_JAIS2_SPACES, r"\s{1,2}(?!\S)", r"\s"),
                )
            )
        ),
    ),
    (
        "deepseek-llm",
        PreTokenizer(
            _cut(
                _EACH_NEWLINE,
                Regex(rf"\s?[{_DEEPSEEK_LETTERS}]+", wide=True),
                Regex(
                    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+", wide=True
                ),
                TrailingSpace(),
                _CJK_HANGUL,
                Regex(r"[\p{N}]+"),
            )
        ),
    ),
    (
        "deepseek-coder",
        PreTokenizer(
            _cut(
                _EACH_NEWLINE,
                Regex(r"\s?[\p{L}]+"),
                Regex(r"\s?[\p{P}]+"),
                _CJK_HANGUL,
                _EACH_DIGIT,
            )
        ),
    ),
    (
        "deepseek-v3 hunyuan-dense joyai-llm hy_v4",
        PreTokenizer(_cut(_EACH_3_DIGITS, _CJK, _DEEPSEEK3)),
    ),
    (
        "spark2_5",
        PreTokenizer(
            _cut(
                _EACH_3_DIGITS,
                _CJK,
                _joined(_ASCII_SIGN_WORD, _LATER_WORD, r" ?[\p{P}\p{S}]+", r"[\r\n]", _SPACES),
                _EACH_DIGIT,
            )
        ),
    ),
    (
        "youtu",
        PreTokenizer(
            _cut(
                _YOUTU_SCRIPTS,
                _joined(
                    *(f"{_WORD_MARKS}(?:{_SUFFIX})?", _DIGIT, _SIGNS_SLASH, _LINES, _SPACES),
                ),
            ),
            ignore_merges=True,
        ),
    ),
    (
        "falcon",
        PreTokenizer(_cut(Regex(r"[\p{P}$+<=>^~|`]+"), _GPT2, Regex("[0-9][0-9][0-9]", wide=True))),
    ),
    (
        "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2",
        PreTokenizer(_cut(_EACH_DIGIT, _GPT2)),
    ),
    (
        "gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert "
        "jina-v1-en jina-v2-code roberta-bpe mpt olmo jais exaone4 trillion granite-docling",
        PreTokenizer(_cut(_GPT2)),
    ),
    (
        "qwen2 deepseek-r1-qwen kormo f2llmv2 stablelm2 hunyuan megrez solar-open grok-2",
        PreTokenizer(_cut(_QWEN2)),
    ),
    (
        "qwen35",
        PreTokenizer(
            _cut(
                _joined(
                    *(_SUFFIX, _WORD_MARKS, _DIGIT),
                    *(r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*", _LINES, _SPACES),
                )
            )
        ),
    ),
    ("poro-chat bloom gpt3-finnish", PreTokenizer(_cut(_POEM))),
    ("viking", PreTokenizer(_cut(_POEM, _EACH_DIGIT))),
    (
        "tekken",
        PreTokenizer(
            _cut(_joined(_cased(_UPPER, _LOWER, ""), _DIGIT, _SIGNS_SLASH, _LINES, _SPACES)),
            ignore_merges=True,
            add_bos=True,
        ),
    ),
    (
        "chameleon",
        PreTokenizer(
            _cut(
                Regex("<sentinel:[0-9]+>", wide=True),
                Regex("IMGIMG[A-I]{1,4}Z", wide=True),
                Regex(r"[\t\n]|    |  ", wide=True),
                _EACH_DIGIT,
                Regex(r"[\p{P}!-/:-@\[-`{-~]"),
                _GPT2,
            ),
            add_bos=True,
        ),
    ),
    (
        "gpt-4o llama4 kanana2 talkie minimax-m2",
        PreTokenizer(
            _cut(
                _joined(
                    _cased(_UPPER, _LOWER, f"(?:{_SUFFIX})?"),
                    *(_DIGITS3, _SIGNS_SLASH, _LINES, _SPACES),
                )
            )
        ),
    ),
    (
        "granite-embed-multi-97m",
        PreTokenizer(
            _cut(
                _joined(
                    _cased(_UPPER + r"\p{M}", _LOWER + r"\p{M}", f"(?:{_SUFFIX})?"),
                    *(_DIGITS3, _SIGNS_SLASH, _LINES, _SPACES),
                )
            ),
            ignore_merges=True,
        ),
    ),
    (
        "tiny_aya cohere2moe",
        PreTokenizer(
            _cut(
                LeadingDigitGroups(),
                _joined(
                    *(f"{_WORD_MARKS}(?:{_SUFFIX})?", _DIGITS3, _SIGNS_SLASH, _LINES, _SPACES),
                ),
            )
        ),
    ),
    (
        "kimi-k2",
        PreTokenizer(
            _cut(
                _joined(
                    r"[\p{Han}]+",
                    rf"[^\r\n\p{{L}}\p{{N}}\p{{Han}}]?[\p{{L}}]+(?:{_SUFFIX})?",
                    *(_DIGITS3, r" ?[^\s\p{L}\p{N}\p{HanL}]+[\r\n]*", _LINES, _SPACES),
                ),
                han=True,
            )
        ),
    ),
    ("superbpe", PreTokenizer(_cut(Regex(r"[\p{N}]+"), DigitGroups()))),
    (
        "bailingmoe bailingmoe2 llada-moe",
        PreTokenizer(_cut(_joined(_SUFFIX, _WORD, _DIGIT, _SIGNS, r"\s*[\r\n]", _SPACES))),
    ),
    (
        "seed-coder",
        PreTokenizer(
            _cut(
                _joined(_SUFFIX, _WORD, _DIGIT, r" ?[^\s\p{L}\p{N}\r\n]+", _LINES, _SPACES),
            )
        ),
    ),
    ("ufakzeka", PreTokenizer(_cut(_joined(_WORD, _DIGIT, _SIGNS, _LINES, _SPACES)))),
    ("afmoe", PreTokenizer(_cut(LeadingDigitGroups(), _AFMOE_SCRIPTS, _DEEPSEEK3))),
    ("laguna", PreTokenizer(_cut(_NEWLINES, _QWEN2))),
    (
        "exaone-moe",
        PreTokenizer(
            _cut(
                _joined(
                    _SUFFIX,
                    r"[^\r\n\p{L}\p{N}]?(?:[\p{L}][\p{M}]*(?: [\p{L}][\p{M}]*)*)+",
                    *(_DIGIT, r" ?[^\s\p{L}\p{N}]+[\r\n/]?", r"\s*[\r\n]", _SPACES),
                )
            )
        ),
    ),
    (
        "gemma4 granite-embed-multi-311m",
        PreTokenizer(_cut(_NEWLINES), add_bos=True, byte_level=False, gemma=True),
    ),
    ("sarvam-moe", PreTokenizer(_cut(_NEWLINES), byte_level=False)),
)

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    name: row for names, row in _FAMILIES for name in names.split()
}
