"""From what the user typed to model files on disk: local path or Hugging Face Hub id.

A local path never touches the network; neither does a hub id whose files are all in the cache.
Everything else goes through ``huggingface_hub``, restricted to the files a model is loaded from:
no Python code, no pickles, no second copies in other formats. A connection that breaks is resumed
where it stopped; a run that was ended keeps the files it had finished.
"""

import glob
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from squall.loaders.errors import ModelLoadError
from squall.loaders.hf_config import shorten
from squall.loaders.hub_access import byte_counter, check_token_source, explained, read_token
from squall.loaders.progress import NoProgress, Progress
from squall.loaders.safetensors import (
    INDEX_NAME,
    SINGLE_NAME,
    choose_unindexed,
    read_weight_map,
    weight_files,
)

# Beside the weights: configuration, tokenizer and template files of a repository's root.
_SIDE_FILES: Final = re.compile(
    r"""(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab
    |chat_template|processor_config|preprocessor_config|quantize_config|quant_config)\.json
    |chat_template\.jinja|additional_chat_templates/[^/]+\.jinja
    |merges\.txt|vocab\.txt|[^/]+\.tiktoken|tokenizer\.model""",
    re.VERBOSE,
)
_TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_SPLIT: Final = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)
_REPO_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_REVISION: Final = re.compile(r"[\w.-]+(/[\w.-]+)*")


@dataclass(frozen=True)
class ModelFiles:
    """Where a model lies. ``paths`` are its weight files, all in ``folder``."""

    kind: Literal["gguf", "safetensors"]
    paths: tuple[Path, ...]
    folder: Path
    name: str


def resolve(
    model: str,
    filename: str | None = None,
    *,
    revision: str | None = None,
    token_source: str = "cache",
    progress: Progress | None = None,
    endpoint: str | None = None,
    cache_dir: Path | None = None,
) -> ModelFiles:
    """Find a model's files, downloading them if need be.

    ``model`` is a ``.gguf`` file, a folder, or a hub id ``org/name`` (``org/name@revision``);
    ``filename`` picks the GGUF file where there are several. ``token_source`` says where the
    access token comes from: ``literal:VALUE``, ``env:VARIABLE``, ``path:FILE``, ``cache`` (what
    ``hf auth login`` or ``HF_TOKEN`` left) or ``none``. Raises ``ModelLoadError``.
    """
    check_token_source(token_source)
    path = Path(model).expanduser()
    if path.is_file():
        return _local_file(path, filename)
    if path.is_dir():
        return _local_folder(path, filename, path.resolve().name)
    repo, _, at = model.partition("@")
    looks_local = model.startswith((".", "/", "~")) or model.endswith((".gguf", ".safetensors"))
    if looks_local or not _REPO_ID.fullmatch(repo) or ".." in repo or "--" in repo:
        hint = "" if looks_local else ", and it is not a hub id (org/name) either"
        raise ModelLoadError(f"{model}: no such file or folder{hint}")
    if at and revision and at != revision:
        raise ModelLoadError(f"{model}: two revisions given, {at} and {revision}")
    revision = at or revision or "main"
    if not _REVISION.fullmatch(revision) or ".." in revision:
        raise ModelLoadError(f"{repo}: {shorten(revision)} is not a revision (branch, tag, commit)")
    hub = _Hub(repo, revision, token_source, endpoint, cache_dir)
    return hub.cached(filename) or hub.download(filename, progress or NoProgress())


def _local_file(path: Path, filename: str | None) -> ModelFiles:
    if filename is not None:
        raise ModelLoadError(f"{path}: is a file, so no file name ({filename}) can be given too")
    if path.suffix.lower() != ".gguf":
        hint = "give its folder" if path.suffix == ".safetensors" else "accepted: a .gguf file"
        raise ModelLoadError(f"{path}: not a GGUF file; {hint}, a model folder or a hub id")
    return _gguf(path, path.stem)


def _gguf(path: Path, name: str) -> ModelFiles:
    """The GGUF model ``path`` belongs to: itself, or all shards of its split."""
    names = split_names(path.name)
    missing = [part for part in names if not (path.parent / part).is_file()]
    if missing:
        raise ModelLoadError(f"{path}: shards of this split GGUF are missing: {missing[0]}")
    split = _SPLIT.fullmatch(path.name)
    name = split[1] if split and name == path.stem else name
    return ModelFiles("gguf", tuple(path.parent / part for part in names), path.parent, name)


def split_names(name: str) -> list[str]:
    """All file names of the split that a GGUF file name belongs to; itself if it is no split."""
    split = _SPLIT.fullmatch(name)
    if not split:
        return [name]
    suffix = name[-5:]
    count = int(split[3])
    return [f"{split[1]}-{i:05d}-of-{count:05d}{suffix}" for i in range(1, count + 1)]


def gguf_models(names: Iterable[str]) -> list[str]:
    """The GGUF models among file names: a split once, by its first file; no projector and no
    importance-matrix files, which are not models."""
    firsts: dict[str, None] = {}
    for name in sorted(names):
        base = name.rsplit("/", 1)[-1].lower()
        helper = base.startswith("mmproj") or "imatrix" in base
        if base.endswith(".gguf") and not helper:
            firsts.setdefault(split_names(name)[0])
    return list(firsts)


def _choose_gguf(where: str, names: Iterable[str], filename: str | None) -> str | None:
    """The GGUF file to load, or None when there is none and none was named."""
    models = gguf_models(names)
    if filename is not None:
        if filename in set(names):
            return filename
        listed = ", ".join(models[:20]) or "no GGUF file"
        raise ModelLoadError(f"{where}: no file {filename}; there: {listed}")
    if len(models) > 1:
        listed = ", ".join(models[:20])
        raise ModelLoadError(f"{where}: {len(models)} GGUF models, name one file: {listed}")
    return models[0] if models else None


def _local_folder(folder: Path, filename: str | None, name: str) -> ModelFiles:
    if filename is not None:
        if not filename.lower().endswith(".gguf"):
            raise ModelLoadError(f"{folder}: {filename}: only a .gguf file can be named")
        names = {str(path.relative_to(folder)) for path in folder.rglob("*.gguf")}
        return _gguf(folder / str(_choose_gguf(str(folder), names, filename)), name)
    names = {path.name for path in folder.iterdir()}
    has_config = "config.json" in names
    if has_config and any(entry.endswith(".safetensors") for entry in names):
        return ModelFiles("safetensors", weight_files(folder), folder, name)
    chosen = _choose_gguf(str(folder), names, None)
    if chosen is not None:
        return _gguf(folder / chosen, name)
    if not has_config:
        raise ModelLoadError(f"{folder}: no config.json and no GGUF file, so no model")
    weight_files(folder)
    raise ModelLoadError(f"{folder}: no weights found; safetensors or GGUF files are needed")


class _Hub:
    """One repository at one revision."""

    def __init__(
        self,
        repo: str,
        revision: str,
        token_source: str,
        endpoint: str | None,
        cache_dir: Path | None,
    ) -> None:
        self.repo, self.revision = repo, revision
        self._source = token_source
        self._common: dict[str, Any] = {
            "revision": revision,
            "cache_dir": cache_dir,
            "endpoint": endpoint,
        }

    def cached(self, filename: str | None) -> ModelFiles | None:
        """The model if all of it is in the cache. Makes no network call."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        def snapshot(patterns: list[str]) -> Path | None:
            # Fails too when an earlier download is known to be incomplete for these patterns.
            try:
                found = snapshot_download(
                    self.repo, allow_patterns=patterns, local_files_only=True, **self._common
                )
            except LocalEntryNotFoundError:
                return None
            return Path(found)

        if filename is not None:
            names = split_names(filename)
            folder = snapshot([glob.escape(name) for name in names])
            if folder is None or not all((folder / name).is_file() for name in names):
                return None
            return _gguf(folder / filename, self.repo)
        folder = snapshot(["config.json"])
        if folder is None:
            return None
        cached = _file_names(folder)
        if "config.json" in cached and any(name.endswith(".safetensors") for name in cached):
            complete = any(name in cached for name in _TOKENIZER_FILES)
            try:
                files = ModelFiles("safetensors", weight_files(folder), folder, self.repo)
            except ModelLoadError:
                return None  # shards are missing
            wanted = [*_TOKENIZER_FILES, "tokenizer_config.json", "*.safetensors.index.json"]
            wanted += [glob.escape(path.name) for path in files.paths]
            return files if complete and snapshot(wanted) else None
        models = gguf_models(cached)
        if len(models) != 1 or snapshot(["*.gguf"]) is None:
            return None
        if not all((folder / name).is_file() for name in split_names(models[0])):
            return None
        return _gguf(folder / models[0], self.repo)

    def download(self, filename: str | None, progress: Progress) -> ModelFiles:
        """Fetch what is missing of the model's files."""
        from huggingface_hub import HfApi, constants, snapshot_download

        if constants.HF_HUB_OFFLINE:
            what = f"{self.repo}/{filename}" if filename else self.repo
            raise ModelLoadError(
                f"{what}: not (completely) in the cache, and HF_HUB_OFFLINE forbids to download it"
            )
        token: str | Literal[False] = read_token(self._source) or False
        with explained(self.repo, self.revision, self._source, bool(token)):
            api = HfApi(endpoint=self._common["endpoint"], token=token)
            info = api.model_info(self.repo, revision=self.revision, files_metadata=True)
            sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
            kind, weights = self._choose(set(sizes), filename, token)
            wanted = list(weights)
            if kind == "safetensors":
                wanted += [name for name in sizes if _SIDE_FILES.fullmatch(name)]
                wanted += [INDEX_NAME] if INDEX_NAME in sizes else []
            total = sum(sizes[name] for name in wanted)
            with progress.phase("download", total, "B") as advance:
                folder = Path(
                    snapshot_download(
                        self.repo,
                        allow_patterns=[glob.escape(name) for name in wanted],
                        token=token,
                        tqdm_class=byte_counter(advance, total),
                        **self._common,
                    )
                )
        if kind == "gguf":
            return _gguf(folder / weights[0], self.repo)
        return ModelFiles("safetensors", weight_files(folder), folder, self.repo)

    def _choose(
        self, names: set[str], filename: str | None, token: str | Literal[False]
    ) -> tuple[Literal["gguf", "safetensors"], list[str]]:
        """Kind and weight files of the repository's model."""
        from huggingface_hub import hf_hub_download

        if filename is None and "config.json" in names:
            if SINGLE_NAME in names:
                return "safetensors", [SINGLE_NAME]
            if INDEX_NAME in names:
                index = hf_hub_download(self.repo, INDEX_NAME, token=token, **self._common)
                shards = sorted(set(read_weight_map(Path(index)).values()))
                missing = [name for name in shards if name not in names]
                if missing:
                    raise ModelLoadError(
                        f"{self.repo}: {INDEX_NAME} lists {missing[0]}, which is not there"
                    )
                return "safetensors", shards
            root = choose_unindexed((name for name in names if "/" not in name), self.repo)
            if root:
                return "safetensors", root
        chosen = _choose_gguf(self.repo, names, filename)
        if chosen is None:
            raise ModelLoadError(
                f"{self.repo}: holds no model in a format known here; safetensors files with a "
                "config.json, or GGUF files are needed"
            )
        parts = split_names(chosen)
        missing = [name for name in parts if name not in names]
        if missing:
            raise ModelLoadError(f"{self.repo}: {missing[0]} of this split GGUF is not there")
        return "gguf", parts


def _file_names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
