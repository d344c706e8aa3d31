"""What front-end and engine say to each other, as tagged msgpack arrays.

Frames on the socket pair are a 4-byte little-endian length and one message.
"""

import struct
from typing import Literal

import msgspec

from squall.runtime.options import EngineOptions
from squall.runtime.request import EngineRequest, TokenEvent

MAX_FRAME = 1 << 30  # bytes; both ends are ours, so this only catches a broken stream


class Load(msgspec.Struct, array_like=True, tag=True, frozen=True):
    """First message to an engine process."""

    kind: Literal["gguf", "safetensors"]
    paths: list[str]
    folder: str
    name: str
    options: EngineOptions


class Submit(msgspec.Struct, array_like=True, tag=True, frozen=True):
    request: EngineRequest


class Abort(msgspec.Struct, array_like=True, tag=True, frozen=True):
    id: int


class Stop(msgspec.Struct, array_like=True, tag=True, frozen=True):
    """End the engine now; running requests are dropped."""


class ModelCard(msgspec.Struct, array_like=True, tag=True, frozen=True):
    """The loaded model, as start-up line and ``/v1/models`` show it; sent once it is ready."""

    name: str
    created: int  # Unix seconds
    format: str  # "Q4_1 GGUF", "BF16 safetensors", ...
    device: str
    dtype: str
    vocab_size: int  # width of the logits
    max_model_len: int  # tokens of one sequence
    kv_tokens: int  # tokens the KV cache holds
    max_seqs: int
    max_queue: int
    weight_bytes: int
    kv_bytes: int


class Phase(msgspec.Struct, array_like=True, tag=True, frozen=True):
    """Progress: a phase begins (``total`` may be unknown), advances or, with ``done``, ends."""

    name: str
    total: int | None = None
    unit: str = "it"
    advance: int = 0
    done: bool = False


class Events(msgspec.Struct, array_like=True, tag=True, frozen=True):
    """One step's news."""

    events: list[TokenEvent]


class Failed(msgspec.Struct, array_like=True, tag=True, frozen=True):
    """The engine could not start, or cannot go on; it exits after this."""

    error: str  # one line
    kind: str  # class name of the exception
    traceback: str


ToEngine = Load | Submit | Abort | Stop
FromEngine = ModelCard | Phase | Events | Failed

_HEADER = struct.Struct("<I")
_encoder = msgspec.msgpack.Encoder()


def encode_frame(message: ToEngine | FromEngine) -> bytes:
    """One message as a frame."""
    body = _encoder.encode(message)
    return _HEADER.pack(len(body)) + body


class FrameReader:
    """Cuts a byte stream into messages of ``kind`` (a union of Structs)."""

    def __init__(self, kind: object) -> None:
        self._decoder = msgspec.msgpack.Decoder(kind)
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[ToEngine | FromEngine]:
        """Add received bytes; return the messages they complete. ValueError: not our stream."""
        buffer = self._buffer
        buffer += data
        messages: list[ToEngine | FromEngine] = []
        start = 0
        while len(buffer) - start >= _HEADER.size:
            (size,) = _HEADER.unpack_from(buffer, start)
            if size > MAX_FRAME:
                raise ValueError(f"frame of {size} bytes")
            end = start + _HEADER.size + size
            if len(buffer) < end:
                break
            messages.append(self._decoder.decode(memoryview(buffer)[start + _HEADER.size : end]))
            start = end
        del buffer[:start]
        return messages
