"""Which module reads which architecture: one row each, imported on first use."""

import difflib
from importlib import import_module
from typing import NamedTuple

from squall.models.config import ConfigReader, DecoderConfig


class Row(NamedTuple):
    """``module`` reads the config; ``family`` is for people. ``text_part``: a text model within a
    larger one, whose config is ``text_config``."""

    module: str
    family: str
    text_part: bool = False


ARCHITECTURES: dict[str, Row] = {
    "ApertusForCausalLM": Row("apertus", "Apertus"),
    "ArceeForCausalLM": Row("arcee", "Arcee AFM"),
    "Cohere2ForCausalLM": Row("cohere2", "Command-R7B, Command A"),
    "CohereForCausalLM": Row("cohere", "Command-R"),
    "DeepseekV2ForCausalLM": Row("deepseek_v2", "DeepSeek V2, V2 Lite, V2.5"),
    "DeepseekV3ForCausalLM": Row("deepseek_v3", "DeepSeek V3, V3.1, R1"),
    "Ernie4_5_MoeForCausalLM": Row("ernie4_5_moe", "ERNIE 4.5 (experts)"),
    "Ernie4_5ForCausalLM": Row("ernie4_5", "ERNIE 4.5 (dense)"),
    "Exaone4ForCausalLM": Row("exaone4", "EXAONE 4"),
    "Gemma2ForCausalLM": Row("gemma2", "Gemma 2"),
    "Gemma3ForCausalLM": Row("gemma3", "Gemma 3 (text)"),
    "Gemma3ForConditionalGeneration": Row("gemma3", "Gemma 3 (text part)", text_part=True),
    "Gemma3nForCausalLM": Row("gemma3n", "Gemma 3n (text)"),
    "Gemma3nForConditionalGeneration": Row("gemma3n", "Gemma 3n (text part)", text_part=True),
    "GemmaForCausalLM": Row("gemma", "Gemma"),
    "Glm4ForCausalLM": Row("glm4", "GLM-4 (0414)"),
    "Glm4MoeForCausalLM": Row("glm4_moe", "GLM-4.5, 4.6"),
    "GlmForCausalLM": Row("glm", "GLM-4 (2024)"),
    "GptOssForCausalLM": Row("gpt_oss", "GPT-OSS"),
    "GraniteForCausalLM": Row("granite", "Granite"),
    "GraniteMoeForCausalLM": Row("granitemoe", "Granite 3 MoE"),
    "GraniteMoeSharedForCausalLM": Row("granitemoe", "Granite MoE with a shared MLP"),
    "HeliumForCausalLM": Row("helium", "Helium"),
    "HunYuanDenseV1ForCausalLM": Row("hunyuan_v1_dense", "HunYuan (dense)"),
    "HunYuanMoEV1ForCausalLM": Row("hunyuan_v1_moe", "HunYuan A13B"),
    "InternLM3ForCausalLM": Row("internlm3", "InternLM 3"),
    "Llama4ForCausalLM": Row("llama4", "Llama 4 (text)"),
    "Llama4ForConditionalGeneration": Row("llama4", "Llama 4 (text part)", text_part=True),
    "LlamaForCausalLM": Row("llama", "Llama 2, 3; Falcon 3, SmolLM, R1 distillations"),
    "Ministral3ForCausalLM": Row("mistral", "Ministral 3 (text)"),
    "MinistralForCausalLM": Row("mistral", "Ministral"),
    "Mistral3ForConditionalGeneration": Row(
        "mistral", "Mistral Small 3.1, Ministral 3 (text part)", text_part=True
    ),
    "MistralForCausalLM": Row("mistral", "Mistral, Nemo"),
    "MixtralForCausalLM": Row("mixtral", "Mixtral"),
    "NemotronForCausalLM": Row("nemotron", "Nemotron, Minitron"),
    "Olmo2ForCausalLM": Row("olmo2", "OLMo 2"),
    "Olmo3ForCausalLM": Row("olmo3", "OLMo 3"),
    "OlmoeForCausalLM": Row("olmoe", "OLMoE"),
    "OlmoForCausalLM": Row("olmo", "OLMo (1)"),
    "Phi3ForCausalLM": Row("phi3", "Phi 3, 3.5, 4, 4 mini"),
    "PhiForCausalLM": Row("phi", "Phi 1, 1.5, 2"),
    "PhimoeForCausalLM": Row("phimoe", "Phi 3.5 MoE"),
    "PhiMoEForCausalLM": Row("phimoe", "Phi 3.5 MoE (its first name)"),
    "Qwen2ForCausalLM": Row("qwen2", "Qwen 2, 2.5; R1 distillations"),
    "Qwen2MoeForCausalLM": Row("qwen2_moe", "Qwen 1.5 MoE, Qwen 2 MoE"),
    "Qwen3ForCausalLM": Row("qwen3", "Qwen 3"),
    "Qwen3MoeForCausalLM": Row("qwen3_moe", "Qwen 3 MoE"),
    "SeedOssForCausalLM": Row("seed_oss", "Seed-OSS"),
    "SmolLM3ForCausalLM": Row("smollm3", "SmolLM 3"),
    "StableLmForCausalLM": Row("stablelm", "StableLM 2"),
    "Starcoder2ForCausalLM": Row("starcoder2", "StarCoder 2"),
}


def read_config(architecture: str, reader: ConfigReader) -> DecoderConfig:
    """The decoder that ``architecture`` (a Hugging Face class name) and its config describe."""
    row = ARCHITECTURES.get(architecture)
    if row is None:
        near = difflib.get_close_matches(architecture, ARCHITECTURES, 1, 0.5)
        hint = f"; nearest: {near[0]}" if near else ""
        known = ", ".join(ARCHITECTURES)
        raise reader.fail(
            "architectures", f"{architecture!r} is not supported{hint}; supported: {known}"
        )
    if row.text_part:
        reader = reader.sub("text_config")
    config: DecoderConfig = import_module(f"squall.models.{row.module}").read_config(reader)
    return config
