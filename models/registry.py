"""Which module reads which architecture: one row each, imported on first use."""

import difflib
from importlib import import_module

from squall.models.config import ConfigReader, DecoderConfig

ARCHITECTURES: dict[str, str] = {
    "Cohere2ForCausalLM": "cohere2",
    "CohereForCausalLM": "cohere",
    "Ernie4_5ForCausalLM": "ernie4_5",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "GemmaForCausalLM": "gemma",
    "Glm4ForCausalLM": "glm4",
    "GlmForCausalLM": "glm",
    "GraniteForCausalLM": "granite",
    "LlamaForCausalLM": "llama",
    "MinistralForCausalLM": "mistral",
    "MistralForCausalLM": "mistral",
    "Olmo2ForCausalLM": "olmo2",
    "Olmo3ForCausalLM": "olmo3",
    "Phi3ForCausalLM": "phi3",
    "PhiForCausalLM": "phi",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "SmolLM3ForCausalLM": "smollm3",
    "StableLmForCausalLM": "stablelm",
    "Starcoder2ForCausalLM": "starcoder2",
}


def read_config(architecture: str, reader: ConfigReader) -> DecoderConfig:
    """The decoder that ``architecture`` (a Hugging Face class name) and its config describe."""
    module = ARCHITECTURES.get(architecture)
    if module is None:
        near = difflib.get_close_matches(architecture, ARCHITECTURES, 1, 0.5)
        hint = f"; nearest: {near[0]}" if near else ""
        known = ", ".join(ARCHITECTURES)
        raise reader.fail(
            "architectures", f"{architecture!r} is not supported{hint}; supported: {known}"
        )
    config: DecoderConfig = import_module(f"squall.models.{module}").read_config(reader)
    return config
