"""From options to a running engine: find the files, load, size the KV cache, report."""

import time
from collections.abc import Callable
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
from squall.models.kv_layout import KVLayout, kv_layout
from squall.runtime.attention import choose_attention
from squall.runtime.client import ProcessEngine, ThreadEngine
from squall.runtime.engine import Engine, probe_batch
from squall.runtime.frontend import Frontend
from squall.runtime.memory import (
    KVMemoryError,
    KVPlan,
    MemoryFacts,
    OptionError,
    check_length,
    check_options,
    plan_kv,
    token_budget,
)
from squall.runtime.messages import Load, ModelCard
from squall.runtime.options import EngineOptions
from squall.runtime.sampler import Sampler, demanding_rows
from squall.runtime.scheduler import Limits

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def model_dtype(name: str, device: torch.device, checkpoint: Checkpoint) -> torch.dtype:
    """The dtype ``name`` (a key of ``DTYPES`` or "auto") means on ``device``.

    "auto" is the device's own choice, but float16 instead of bfloat16 where the file's numbers
    are float16 (GGUF blocks have float16 scales) and the architecture keeps within its range:
    three more bits.
    """
    if name != "auto" and name not in DTYPES:
        raise OptionError(f"dtype {name!r} is not known; accepted: auto, {', '.join(DTYPES)}")
    if name != "auto":
        return DTYPES[name]
    chosen = backend_of(device).default_dtype(device)
    narrow = checkpoint.stores_f16() and not checkpoint.config().wide_range
    return torch.float16 if chosen == torch.bfloat16 and narrow else chosen


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


def open_process(
    options: EngineOptions,
    progress: Progress,
    on_child: Callable[[ProcessEngine], None] = lambda engine: None,
) -> tuple[Frontend, ProcessEngine]:
    """An engine in a process of its own; events flow once ``attach`` was called on it.

    ``on_child`` gets the engine as soon as its process runs, before it loads: another thread may
    ``kill`` it to end this call early.
    """
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
        on_child(engine)
        assets = Checkpoint(files).text(_template_file(options))  # while the child imports torch
        card = engine.start(progress)
    except BaseException:
        engine.close()
        raise
    return Frontend(card, assets, engine), engine


def _build(
    checkpoint: Checkpoint, options: EngineOptions, progress: Progress
) -> tuple[Engine, ModelCard]:
    check_options(options)
    device = resolve_device(options.device)
    config = checkpoint.config()
    dtype = model_dtype(options.dtype, device, checkpoint)
    longest = longest_context(options, config)
    choose_attention(config, dtype, device, options)  # tells a wrong choice before loading
    model = checkpoint.decoder(device, dtype, longest, progress)
    engine, plan, facts = start_engine(model, options, progress)
    card = ModelCard(
        name=checkpoint.files.name,
        created=int(time.time()),
        format=checkpoint.format(),
        device=backend_of(device).describe(device),
        dtype=next(name for name, value in DTYPES.items() if value == dtype),
        vocab_size=config.vocab_size,
        max_model_len=plan.max_seq_len,
        kv_tokens=plan.blocks // engine.limits.groups * options.pa_blk_size,
        max_seqs=options.max_seqs,
        max_queue=options.max_queue,
        weight_bytes=facts.weights,
        kv_bytes=engine.cache.nbytes,
    )
    return engine, card


def longest_context(options: EngineOptions, config: DecoderConfig) -> int:
    """The longest sequence (tokens) that was asked for, or else the model's own. Raises OptionError
    where the model cannot have it."""
    check_length(options, config.longest_position)
    return options.max_seq_len or config.max_position


def start_engine(
    model: Decoder, options: EngineOptions, progress: Progress
) -> tuple[Engine, KVPlan, MemoryFacts]:
    """An engine for a loaded model: measure, size the KV cache, capture the decode step.

    Raises OptionError, KVMemoryError.
    """
    check_options(options)
    config = model.config
    attend = choose_attention(config, model.dtype, model.device, options)
    if attend is not None:
        model.use_attention(attend)
    facts = _measure(model, options)
    longest = longest_context(options, config)
    layout = kv_layout(config, longest)
    block_bytes = layout.block_bytes(config, model.dtype.itemsize, options.pa_blk_size)
    plan = plan_kv(options, facts, block_bytes, longest, layout.windows)
    cache = _cache(model, layout.group_layers, plan.blocks, options.pa_blk_size)
    cache = cache.shared(layout.groups, layout.places)
    engine = Engine(model, cache, _limits(options, plan, facts, layout))
    if model.device.type == "cuda" and not options.enforce_eager:
        engine.runner.capture(progress)
    return engine, plan, facts


def _limits(options: EngineOptions, plan: KVPlan, facts: MemoryFacts, layout: KVLayout) -> Limits:
    return Limits(
        max_seqs=options.max_seqs,
        token_budget=token_budget(options, facts.total, facts.lazy),
        block_size=options.pa_blk_size,
        max_queue=options.max_queue,
        max_seq_len=plan.max_seq_len,
        windows=layout.windows,
    )


def _cache(model: Decoder, layers: int, blocks: int, block_size: int) -> KVCache:
    shape = model.config.kv_shape
    return KVCache.allocate(layers, blocks, block_size, shape, model.dtype, model.device)


def _measure(model: Decoder, options: EngineOptions) -> MemoryFacts:
    """Memory as it is with the weights loaded, and the peak of the largest legal step."""
    backend = backend_of(model.device)
    lazy = model.device.type == "cpu"
    longest = longest_context(options, model.config)
    budget = token_budget(options, backend.memory(model.device)[1], lazy)
    tokens = min(budget, options.max_seqs * longest)
    on_cpu = model.device.type in ("cpu", "mps")
    activations = (
        _estimate_activations(model.config, tokens, options.max_seqs, model.dtype.itemsize)
        if on_cpu
        else _probe_activations(model, tokens, options)
    )
    free, total = backend.memory(model.device)
    return MemoryFacts(str(model.device), total, free, model.nbytes, activations, lazy)


@torch.inference_mode()
def _probe_activations(model: Decoder, tokens: int, options: EngineOptions) -> int:
    """Run the largest legal step, every sampling feature on, and read the allocator's peak."""
    module = torch.cuda if model.device.type == "cuda" else torch.xpu
    blocks = -(-tokens // options.pa_blk_size)
    cache = _cache(model, model.config.num_caches, blocks, options.pa_blk_size)
    before = module.memory_allocated(model.device)
    module.reset_peak_memory_stats(model.device)
    batch = probe_batch(model, tokens, options.max_seqs, options.pa_blk_size)
    vocab_size = model.config.vocab_size
    try:
        logits = model(batch, cache)
        Sampler(vocab_size, model.device).sample(logits, demanding_rows(len(logits), vocab_size))
    except torch.OutOfMemoryError as error:
        raise KVMemoryError(
            f"a step of {tokens} tokens does not fit on {model.device} beside "
            f"{model.nbytes / 2**30:.2f} GiB of weights; use a smaller --max-seqs and --max-seq-len"
        ) from error
    peak = module.max_memory_allocated(model.device) - before
    del logits, batch, cache
    module.empty_cache()
    return int(peak)


def _estimate_activations(config: DecoderConfig, tokens: int, seqs: int, itemsize: int) -> int:
    """The largest step's live tensors: residual stream and the widest layer's, and the logits
    with the sampler's copies (float32)."""
    widest = 4 * config.hidden_size + max(config.attention_width, 3 * config.intermediate_size)
    floats = 3 * seqs * config.vocab_size
    if config.altup:  # its streams before, predicted and after; and each token's inputs
        inputs = config.num_layers * config.altup.input_size
        floats += 3 * tokens * (config.altup.streams * config.hidden_size + inputs)
    return tokens * widest * itemsize + 4 * floats


def _template_file(options: EngineOptions) -> Path | None:
    if options.chat_template is None:
        return None
    path = Path(options.chat_template)
    if not path.is_file():
        raise ModelLoadError(f"{path}: the chat template file does not exist")
    return path
