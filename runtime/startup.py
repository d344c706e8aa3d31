"""From options to a running engine: find the files, load, size the KV cache, report."""

import os
import time
from pathlib import Path

import torch

from squall.kernels.backends.device import backend_of, resolve_device
from squall.loaders.errors import ModelLoadError
from squall.loaders.hub import ModelFiles, resolve
from squall.loaders.load import Checkpoint
from squall.loaders.progress import Progress
from squall.loaders.pypi import demo_model
from squall.models.batch import KVCache
from squall.models.config import DecoderConfig
from squall.models.decoder import Decoder
from squall.runtime.client import ProcessEngine, ThreadEngine
from squall.runtime.engine import Engine, probe_batch
from squall.runtime.frontend import Frontend
from squall.runtime.messages import Load, ModelCard
from squall.runtime.options import EngineOptions
from squall.runtime.params import SamplingParams
from squall.runtime.sampler import Sampler, SampleRow
from squall.runtime.scheduler import Limits

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
BLOCK_SIZES = (8, 16, 32, 64)


class OptionError(ValueError):
    """An engine option has a value that cannot be used; the message is one line."""


def model_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype ``name`` (a key of ``DTYPES`` or "auto") means on ``device``."""
    if name == "auto":
        return backend_of(device).default_dtype(device)
    if name not in DTYPES:
        raise OptionError(f"dtype {name!r} is not known; accepted: auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def find_model(options: EngineOptions, progress: Progress) -> ModelFiles:
    """The files ``options`` name, downloaded if need be; without a model, the demo model."""
    if options.model is None:
        if options.filename is not None:
            raise OptionError("a file name (-f) needs a model folder or repository (-m)")
        return resolve(str(demo_model(progress)), progress=progress)
    return resolve(
        options.model,
        options.filename,
        token_source=options.token_source,
        progress=progress,
    )


def build_engine(
    files: ModelFiles, options: EngineOptions, progress: Progress
) -> tuple[Engine, ModelCard]:
    """Load a model and make an engine of it.

    Raises ModelLoadError, DeviceError, OptionError, KVMemoryError.
    """
    return _build(Checkpoint(files), options, progress)


def open_thread(options: EngineOptions, progress: Progress) -> Frontend:
    """An engine in a thread of this process."""
    checkpoint = Checkpoint(find_model(options, progress))
    engine, card = _build(checkpoint, options, progress)
    assets = checkpoint.text(_template_file(options))
    return Frontend(card, assets, ThreadEngine(engine))


def open_process(options: EngineOptions, progress: Progress) -> tuple[Frontend, ProcessEngine]:
    """An engine in a process of its own; events flow once ``attach`` was called on it."""
    files = find_model(options, progress)
    load = Load(
        kind=files.kind,
        paths=[str(path) for path in files.paths],
        folder=str(files.folder),
        name=files.name,
        options=options,
    )
    engine = ProcessEngine(load)
    try:
        assets = Checkpoint(files).text(_template_file(options))  # while the child imports torch
        card = engine.start(progress)
    except BaseException:
        engine.close()
        raise
    return Frontend(card, assets, engine), engine


def _template_file(options: EngineOptions) -> Path | None:
    if options.chat_template is None:
        return None
    path = Path(options.chat_template)
    if not path.is_file():
        raise ModelLoadError(f"{path}: the chat template file does not exist")
    return path
