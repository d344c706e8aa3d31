"""``python tools/logits.py MODEL --ids 1,2,3 --out FILE.safetensors``: every position's logits.

Writes one float32 tensor ``logits`` ``[T, vocab]``. Needs no tokenizer in the folder.
"""

import sys

if __name__ == "__main__":  # tools/tokenize.py must not shadow the standard library's tokenize
    sys.path.pop(0)

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from squall.kernels.backends.device import DeviceError, resolve_device
from squall.loaders.errors import ModelLoadError
from squall.loaders.hub import resolve
from squall.loaders.load import Checkpoint
from squall.loaders.progress import NoProgress
from squall.models.batch import Batch, KVCache
from squall.models.decoder import Decoder
from squall.runtime.startup import DTYPES, model_dtype

BLOCK_SIZE = 32


@torch.inference_mode()
def sequence_logits(
    model: Decoder, ids: Sequence[int], chunk: int, block_size: int = BLOCK_SIZE
) -> Tensor:
    """Float32 logits ``[T, vocab]`` of one sequence, computed ``chunk`` tokens at a time."""
    config = model.config
    blocks = -(-len(ids) // block_size)
    cache = KVCache.allocate(
        config.num_caches,
        blocks,
        block_size,
        config.kv_shape,
        model.dtype,
        model.device,
    )
    parts = []
    for start in range(0, len(ids), chunk):
        part = ids[start : start + chunk]
        parts.append(model(_batch(part, start, blocks, model.device), cache).cpu())
    return torch.cat(parts)


def _batch(ids: Sequence[int], start: int, blocks: int, device: torch.device) -> Batch:
    """One sequence's tokens ``start...`` in cache blocks 0, 1, 2, ..."""
    end = start + len(ids)
    positions = torch.arange(start, end, device=device)
    return Batch(
        token_ids=torch.tensor(ids, device=device),
        positions=positions,
        slots=positions,
        query_start=torch.tensor([0, len(ids)], dtype=torch.int32, device=device),
        context_lens=torch.tensor([end], dtype=torch.int32, device=device),
        block_tables=torch.arange(blocks, dtype=torch.int32, device=device)[None],
        logit_rows=torch.arange(len(ids), device=device),
        max_query_len=len(ids),
        max_context_len=end,
    )


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of ids like 1,2,3") from None


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/logits.py", description=__doc__.split("\n")[0])
    parser.add_argument("model", help="GGUF file, model folder or hub id")
    parser.add_argument("--ids", type=_ids, required=True, help="token ids, like 1,2,3")
    parser.add_argument("--out", type=Path, required=True, help="the safetensors file to write")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda[:n], xpu, mps, auto")
    parser.add_argument("--dtype", default="f32", choices=["auto", *DTYPES])
    parser.add_argument("--chunk", type=int, default=512, help="tokens of one step (default 512)")
    args = parser.parse_args()
    if args.chunk < 1:
        parser.error("--chunk must be at least 1")
    try:
        device = resolve_device(args.device)
        checkpoint = Checkpoint(resolve(args.model))
        vocab = checkpoint.config().vocab_size
        bad = [i for i in args.ids if not 0 <= i < vocab]
        if bad:
            raise ModelLoadError(f"--ids: {bad[0]} is not in 0..{vocab - 1}")
        dtype = model_dtype(args.dtype, device, checkpoint)
        model = checkpoint.decoder(device, dtype, len(args.ids), NoProgress())
    except (ModelLoadError, DeviceError) as error:
        print(error, file=sys.stderr)
        return 1
    save_file({"logits": sequence_logits(model, args.ids, args.chunk)}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
