"""``Checkpoint``: opened model files, from which come the decoder and what the front-end needs."""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from squall.kernels.backends.device import backend_of
from squall.loaders.chat_template import (
    ChatTemplate,
    TemplateError,
    TemplateSource,
    load_chat_template,
    read_template_file,
)
from squall.loaders.gguf import GGUFFile
from squall.loaders.gguf_config import gguf_config
from squall.loaders.hf_config import ConfigReader, eos_ids, find_architecture
from squall.loaders.hub import ModelFiles
from squall.loaders.progress import Progress
from squall.loaders.quantization import check_quantization
from squall.loaders.safetensors import SafetensorsFolder
from squall.loaders.text_part import text_name
from squall.loaders.tokenizer import Tokenizer
from squall.loaders.tokenizers.gguf import gguf_tokenizer
from squall.loaders.tokenizers.hf import hf_tokenizer
from squall.loaders.weights import GGUFWeights, SafetensorsWeights
from squall.models.build import build_decoder
from squall.models.config import DecoderConfig
from squall.models.decoder import Decoder
from squall.models.registry import ARCHITECTURES, read_config
from squall.models.rope import check_rope

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.uint8: "U8",
}
# Weight types without float16 numbers.
_NO_F16 = ("BF16", "F32", "F64", "F8_E4M3", "U8", "MXFP4")


@dataclass(frozen=True)
class TextAssets:
    """What the front-end reads from a model's files."""

    tokenizer: Tokenizer
    template: ChatTemplate | TemplateError | None  # TemplateError: what is wrong with it
    eos_ids: frozenset[int]


class Checkpoint:
    """One model's files. Every method raises ModelLoadError for what is wrong with them."""

    def __init__(self, files: ModelFiles) -> None:
        self.files = files
        self._gguf: GGUFFile | None = None
        if files.kind == "gguf":
            self._gguf = GGUFFile.open(files.paths[0])

    def config(self) -> DecoderConfig:
        """The shape of the model."""
        reader = self._reader()
        config = read_config(find_architecture(reader), reader)
        if self._text_part(reader):  # its config and the one around it may disagree
            config = replace(config, tie_embeddings="lm_head.weight" not in self._folder(reader))
        for rope in config.ropes:
            problem = check_rope(rope)
            if problem:
                raise reader.fail("rope_scaling", problem)
        check_quantization(reader)
        return config

    def decoder(
        self, device: torch.device, dtype: torch.dtype, max_len: int, progress: Progress
    ) -> Decoder:
        """The model with its weights on ``device``; ``max_len`` tokens is its longest sequence.

        Floating-point weights are converted to ``dtype``, quantised ones stay as they are. A tensor
        that is missing, misshapen or left over is an error.
        """
        config = self.config()
        backend_of(device).prepare()
        if self._gguf is not None:
            total = sum(tensor.nbytes for tensor in self._gguf.tensors.values())
            metadata = gguf_config(self._gguf)
            with progress.phase("load", total, "B") as advance:
                blocks = GGUFWeights(self._gguf, metadata, dtype, device, advance)
                model = build_decoder(config, blocks, max_len)
                blocks.finish()
            return model
        folder = self._folder(self._reader())
        with progress.phase("load", folder.nbytes, "B") as advance:
            source = SafetensorsWeights(folder, dtype, device, advance)
            model = build_decoder(config, source, max_len)
            source.finish(config.tie_embeddings, config.num_layers)
        return model

    def text(self, template: Path | None = None) -> TextAssets:
        """Tokenizer, chat template (``template``, a file, replaces the model's own) and the ids
        that end a turn."""
        if self._gguf is not None:
            tokenizer: Tokenizer = gguf_tokenizer(self._gguf.metadata, self._gguf.path)
            source: TemplateSource | None = self._gguf.get_str("tokenizer.chat_template", None)
            ends = tokenizer.eos_ids
        else:
            folder = self.files.folder
            tokenizer = hf_tokenizer(folder)
            source = load_chat_template(folder)
            ends = tokenizer.eos_ids | eos_ids(folder)
        if template is not None:
            source = read_template_file(template)
        return TextAssets(tokenizer, _template(source, tokenizer), frozenset(ends))

    def format(self) -> str:
        """The commonest weight type and the container: ``"Q4_1 GGUF"``, ``"BF16 safetensors"``."""
        kind = "GGUF" if self._gguf is not None else "safetensors"
        return f"{self._commonest_type()} {kind}"

    def stores_f16(self) -> bool:
        """Whether most weights are float16, or quantised with float16 scales."""
        return self._commonest_type() not in _NO_F16

    def _commonest_type(self) -> str:
        """The type most bytes of the file have, as its format spells it."""
        sizes: Counter[str] = Counter()
        if self._gguf is not None:
            for tensor in self._gguf.tensors.values():
                sizes[tensor.format.name] += tensor.nbytes
        else:
            folder = self._folder(self._reader())
            for name in folder.names():
                info = folder.info(name)
                sizes[_DTYPE_NAMES.get(info.dtype, str(info.dtype))] += info.end - info.begin
        return sizes.most_common(1)[0][0]

    def _text_part(self, reader: ConfigReader) -> bool:
        return self._gguf is None and ARCHITECTURES[find_architecture(reader)].text_part

    def _folder(self, reader: ConfigReader) -> SafetensorsFolder:
        """The tensors of the text model."""
        folder = SafetensorsFolder.open(self.files.paths)
        return folder.renamed(text_name) if self._text_part(reader) else folder

    def _reader(self) -> ConfigReader:
        if self._gguf is not None:
            return ConfigReader(gguf_config(self._gguf), self.files.paths[0])
        return ConfigReader.from_file(self.files.folder / "config.json")


def _template(
    source: TemplateSource | None, tokenizer: Tokenizer
) -> ChatTemplate | TemplateError | None:
    if source is None:
        return None

    def text(token_id: int | None) -> str:
        return "" if token_id is None else tokenizer.token_text(token_id)

    try:
        return ChatTemplate(
            source,
            bos_token=text(tokenizer.bos_id),
            eos_token=text(tokenizer.eos_id),
            unk_token=text(tokenizer.unk_id),
        )
    except TemplateError as error:  # plain completions work without; chats say why they do not
        return error
