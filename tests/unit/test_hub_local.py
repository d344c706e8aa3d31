"""Model resolution without the hub: local paths, names, token sources."""

import socket
from pathlib import Path

import pytest

from squall.loaders.errors import ModelLoadError
from squall.loaders.hub import ModelFiles, gguf_models, resolve, split_names
from squall.loaders.hub_access import read_token


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a network call was made")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)


def names(files: ModelFiles) -> list[str]:
    return [path.name for path in files.paths]


@pytest.mark.parametrize("source", ["", "token", "literal:", "env:", "file:x", "none:1"])
def test_token_source_forms(source: str) -> None:
    with pytest.raises(ModelLoadError, match="accepted: literal:VALUE, env:VARIABLE"):
        resolve("org/model", token_source=source)


def test_token_sources_that_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH", raising=False)
    assert read_token("none") is None
    with pytest.raises(ModelLoadError, match="variable NO_SUCH is not set"):
        read_token("env:NO_SUCH")
    with pytest.raises(ModelLoadError, match="no such file, or empty"):
        read_token(f"path:{tmp_path / 'absent'}")
    with pytest.raises(ModelLoadError, match="no token has") as caught:
        read_token("literal:secret\nX-Evil: 1")
    assert "secret" not in str(caught.value)


def test_local_gguf_file(tmp_path: Path, no_network: None) -> None:
    path = tmp_path / "m.Q4.gguf"
    path.touch()
    assert resolve(str(path)) == ModelFiles("gguf", (path,), tmp_path, "m.Q4")
    shards = [tmp_path / f"big-0000{i}-of-00002.gguf" for i in (1, 2)]
    shards[1].touch()
    with pytest.raises(ModelLoadError, match=r"missing: big-00001-of-00002\.gguf"):
        resolve(str(shards[1]))
    shards[0].touch()
    assert resolve(str(shards[1])) == ModelFiles("gguf", tuple(shards), tmp_path, "big")
    with pytest.raises(ModelLoadError, match=r"no file name \(x\.gguf\)"):
        resolve(str(path), "x.gguf")


def test_local_folder(tmp_path: Path, no_network: None) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    with pytest.raises(ModelLoadError, match=r"no config\.json and no GGUF file"):
        resolve(str(folder))
    (folder / "config.json").touch()
    with pytest.raises(ModelLoadError, match="no weights found"):
        resolve(str(folder))
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(ModelLoadError, match="safetensors or GGUF files are needed"):
        resolve(str(folder))
    (folder / "a.gguf").touch()
    (folder / "mmproj-a.gguf").touch()
    assert names(resolve(str(folder))) == ["a.gguf"]
    (folder / "b.gguf").touch()
    with pytest.raises(ModelLoadError, match=r"2 GGUF models, name one file: a\.gguf, b\.gguf"):
        resolve(str(folder))
    assert names(resolve(str(folder), "b.gguf")) == ["b.gguf"]
    (folder / "model.safetensors").touch()
    files = resolve(str(folder))
    assert (files.kind, files.name) == ("safetensors", "my-model")
    assert names(resolve(str(folder), "b.gguf")) == ["b.gguf"]
    for wrong, message in (("c.gguf", r"no file c\.gguf"), ("x.txt", "only a .gguf file")):
        with pytest.raises(ModelLoadError, match=message):
            resolve(str(folder), wrong)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./absent", "no such file or folder$"),
        ("/absent/model.gguf", "no such file or folder$"),
        ("absent.gguf", "no such file or folder$"),
        ("absent", r"not a hub id \(org/name\) either$"),
        ("a/b/c", "not a hub id"),
        ("org/na me", "not a hub id"),
        ("org/../x", "no such file or folder"),
        ("", "no such file or folder|no config.json"),
        ("org/model@..", "not a revision"),
    ],
)
def test_what_is_neither_local_nor_an_id(
    model: str, message: str, no_network: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelLoadError, match=message):
        resolve(model)


def test_two_revisions() -> None:
    with pytest.raises(ModelLoadError, match="two revisions given, a and b"):
        resolve("org/model@a", revision="b")


def test_gguf_names() -> None:
    assert split_names("x.gguf") == ["x.gguf"]
    assert split_names("d/x-00002-of-00003.gguf") == [
        f"d/x-0000{i}-of-00003.gguf" for i in (1, 2, 3)
    ]
    listed = ["b.gguf", "x-00002-of-00002.gguf", "x-00001-of-00002.gguf", "a/imatrix.gguf", "c.bin"]
    assert gguf_models(listed) == ["b.gguf", "x-00001-of-00002.gguf"]
