"""What is measured: an engine on a model's files, or on random weights of a public architecture."""

import time
from dataclasses import dataclass

import msgspec
import torch

from squall.bench.cases import case_config
from squall.bench.random_weights import QuantisedWeights
from squall.kernels.backends.device import backend_of, resolve_device
from squall.loaders.progress import Progress
from squall.models.build import build_decoder
from squall.models.config import DecoderConfig
from squall.models.decoder import Decoder
from squall.models.weights import RandomWeights
from squall.runtime.engine import Engine
from squall.runtime.memory import OptionError
from squall.runtime.options import EngineOptions
from squall.runtime.startup import (
    DTYPES,
    build_engine,
    find_model,
    longest_context,
    start_engine,
)

DENSE = "none"  # the quantisation of a case that has none


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    """``case`` with random weights in ``quant``'s types; without a case, the model ``options``
    name."""

    case: str | None
    quant: str
    options: EngineOptions


@dataclass(frozen=True)
class Subject:
    """An engine that is ready, and how long it took to become so."""

    engine: Engine
    name: str
    format: str  # "q4_k_m", "bf16", "Q4_1 GGUF"
    graphs: bool  # whether decode steps are replayed from CUDA graphs
    seconds: dict[str, float]  # by phase of the start

    @property
    def dtype(self) -> str:
        return next(name for name, value in DTYPES.items() if value == self.engine.model.dtype)


def open_subject(spec: Spec, progress: Progress) -> Subject:
    """Build it. Raises ValueError for an unknown case or recipe, and what ``build_engine`` does."""
    options, begin = spec.options, time.perf_counter()
    if spec.case is None:
        engine, card = build_engine(find_model(options, progress), options, progress)
        seconds = {"load": time.perf_counter() - begin}
        return Subject(engine, card.name, card.format, _graphs(engine, options), seconds)
    device = resolve_device(options.device)
    model = random_model(spec, device)
    backend_of(device).synchronize(device)
    built = time.perf_counter()
    engine, _, _ = start_engine(model, options, progress)
    backend_of(device).synchronize(device)
    seconds = {"weights": built - begin, "engine": time.perf_counter() - built}
    quant = spec.quant
    if quant == DENSE:
        quant = next(name for name, value in DTYPES.items() if value == model.dtype)
    return Subject(engine, spec.case, quant, _graphs(engine, options), seconds)


def random_model(spec: Spec, device: torch.device) -> Decoder:
    """The decoder of a case, its weights made on ``device``."""
    assert spec.case is not None
    config = case_config(spec.case)
    dtype = _dtype(spec, config, device)
    backend_of(device).prepare()
    source: RandomWeights
    if spec.quant == DENSE:
        source = RandomWeights(dtype, device)
    else:
        source = QuantisedWeights(spec.quant, config, dtype, device)
    return build_decoder(config, source, longest_context(spec.options, config))


def _dtype(spec: Spec, config: DecoderConfig, device: torch.device) -> torch.dtype:
    """As for model files: quantised weights have float16 scales, so float16 is chosen for them
    where the device's own choice is bfloat16 and the architecture keeps within its range."""
    name = spec.options.dtype
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise OptionError(f"dtype {name!r} is not known; accepted: auto, {', '.join(DTYPES)}")
    chosen = backend_of(device).default_dtype(device)
    narrow = spec.quant != DENSE and not config.wide_range
    return torch.float16 if narrow and chosen == torch.bfloat16 else chosen


def _graphs(engine: Engine, options: EngineOptions) -> bool:
    return engine.model.device.type == "cuda" and not options.enforce_eager
