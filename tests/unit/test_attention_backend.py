"""The attention backend a user asks for."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from squall.kernels.attention import xformers_backend
from squall.kernels.attention.paged import paged_attention
from squall.models.config import LayerConfig, MLAConfig
from squall.runtime.attention import choose_attention
from squall.runtime.memory import OptionError
from squall.runtime.options import EngineOptions


def chosen(name: str, window: int = 0, device: str = "cuda", mla: MLAConfig | None = None) -> Any:
    config: Any = SimpleNamespace(
        layers=(LayerConfig(), LayerConfig(window)), attention_softcap=0.0, head_dim=64, mla=mla
    )
    options = EngineOptions(attention_backend=name)
    return choose_attention(config, torch.bfloat16, torch.device(device), options)


def test_what_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xformers_backend, "probe", lambda: None)
    assert chosen("auto") is None
    assert chosen("triton") is paged_attention
    assert chosen("xformers") is xformers_backend.paged_attention


def test_latent_attention_has_kernels_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xformers_backend, "probe", lambda: None)
    sizes = MLAConfig(None, 512, 128, 64, 128)
    assert chosen("auto", mla=sizes) is None
    assert chosen("triton", mla=sizes) is None
    with pytest.raises(OptionError, match=r"no latent attention .*; accepted here: auto"):
        chosen("xformers", mla=sizes)


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="'flash' is not known; accepted: auto, triton, xformers"):
        chosen("flash")
    monkeypatch.setattr(xformers_backend, "probe", lambda: "xformers is not installed")
    with pytest.raises(OptionError, match="xformers is not installed; accepted here: auto, triton"):
        chosen("xformers")
    monkeypatch.setattr(xformers_backend, "probe", lambda: None)
    with pytest.raises(OptionError, match="has no window; accepted here"):
        chosen("xformers", window=9)
    with pytest.raises(OptionError, match="has no chunks; accepted here"):
        chosen("xformers", window=-9)
    with pytest.raises(OptionError, match="it needs a CUDA GPU, not cpu; accepted here"):
        chosen("xformers", device="cpu")
