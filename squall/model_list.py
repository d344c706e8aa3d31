"""``squall models``: which models can be run; ``docs/models.md`` is the same table."""

import json
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

from squall.loaders.gguf_architectures import ARCHITECTURES as GGUF
from squall.models.registry import ARCHITECTURES

# In GGUF files Mistral, Mixtral and InternLM 3 are Llamas, OLMo 3 is an OLMo 2 with a window.
_SHARED = {
    "DeepseekV3ForCausalLM": "deepseek2",
    "GraniteMoeSharedForCausalLM": "granitemoe",
    "InternLM3ForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "MixtralForCausalLM": "llama",
    "Olmo3ForCausalLM": "olmo2",
    "PhiMoEForCausalLM": "phimoe",
}
_HEAD = ("family", "Hugging Face class", "GGUF architecture")


@dataclass(frozen=True)
class Supported:
    """One architecture; ``gguf`` is ``general.architecture`` of its files, None if not read."""

    family: str
    hf_class: str
    gguf: str | None


def supported() -> list[Supported]:
    """All architectures, by family."""
    names = {row.hf_class: name for name, row in GGUF.items()} | _SHARED
    rows = [Supported(r.family, name, names.get(name)) for name, r in ARCHITECTURES.items()]
    return sorted(rows, key=lambda row: row.family.lower())


def markdown() -> str:
    """``docs/models.md``."""
    lines = [
        "# Models",
        "",
        "Made by `python tools/models_table.py`; `squall models` prints the same.",
        "",
        "Safetensors in f32, f16, bf16 and FP8 (e4m3 with scales by 128 x 128); GGUF in F32, F16,",
        "BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to Q6_K and MXFP4. The logits of every row are",
        "compared with those of transformers, as a whole, in chunks and token by token",
        "(`tests/e2e/test_golden_logits.py`; with `-m gpu` on a GPU), and from GGUF files in F32",
        "and Q8_0 (`tests/e2e/test_golden_gguf.py`).",
        "",
        f"| {' | '.join(_HEAD)} |",
        "|---|---|---|",
    ]
    for row in supported():
        gguf = f"`{row.gguf}`" if row.gguf else ""
        lines.append(f"| {row.family} | `{row.hf_class}` | {gguf} |")
    return "\n".join(lines) + "\n"


def models(*, as_json: bool = False) -> int:
    """Print the table to standard output."""
    rows = supported()
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return 0
    table = Table(*_HEAD, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(row.family, row.hf_class, row.gguf or "")
    Console(highlight=False).print(table)
    return 0
