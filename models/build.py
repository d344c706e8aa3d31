"""The decoder that a config describes."""

from squall.models.altup import AltUpDecoder
from squall.models.config import DecoderConfig
from squall.models.decoder import Decoder
from squall.models.weights import WeightSource


def build_decoder(config: DecoderConfig, source: WeightSource, max_len: int) -> Decoder:
    """Reads all weights; ``max_len`` is the longest sequence (tokens)."""
    kind = AltUpDecoder if config.altup else Decoder
    return kind(config, source, max_len)
