"""The file that carries Fisher information: a layer is read, and checked, when it is asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

from pydantic import TypeAdapter
from torch import Tensor

from orthomerge.errors import StatisticsError
from orthomerge.io.names import FISHER
from orthomerge.io.sealed import SealedKind, digest

FORMAT = 1
SUFFIX = ".fisher.safetensors"
ENTRY = "orthomerge-fisher"
_FILE = SealedKind(ENTRY, FORMAT, FISHER, "Fisher information")
is_fisher = _FILE.wrote
"""Whether a file is one of Fisher information, by its metadata."""


@dataclass(frozen=True)
class FisherMeta:
    """What the information belongs to; enough to refuse a mismatch.

    `model_sha256` identifies the base model, `adapter_sha256` the adapter's weights; `samples` is
    the number of rows, `task` the task they are of; `form` is "text" where the adapter answers in
    words, and `prompt` then the hash of how it is asked.
    """

    model_id: str
    adapter_sha256: str
    task: str
    samples: int
    model_sha256: str | None = None
    data: str | None = None
    form: str = "classifier"
    prompt: str | None = None
    format: int = FORMAT
    tool: str = field(default_factory=lambda: f"orthomerge {version('orthomerge')}")


_META = TypeAdapter(FisherMeta)


class Fisher(Mapping[str, Tensor]):
    """Fisher information by layer, as read from a file: `[d_out, d_in]` each, and `meta`.

    A layer is read, and checked, when it is asked for, and none is kept: a merge that goes layer by
    layer holds no more than it needs.
    """

    def __init__(self, path: Path, digests: Mapping[str, str], meta: FisherMeta) -> None:
        self.path, self.meta = path, meta
        self._digests = dict(digests)

    def __getitem__(self, layer: str) -> Tensor:
        written = self._digests[layer]
        with _FILE.open(self.path) as stream:
            value = stream.get_tensor(layer)
            if digest({layer: value}) != written:
                raise ValueError(f"layer '{layer}' is not what was written")
        return value

    def __contains__(self, layer: object) -> bool:
        return layer in self._digests  # the inherited one would read the layer

    def __iter__(self) -> Iterator[str]:
        return iter(self._digests)

    def __len__(self) -> int:
        return len(self._digests)


def save_fisher(
    path: str | Path, fisher: Mapping[str, Tensor], meta: FisherMeta, *, replace: bool = False
) -> Path:
    """Write one `.safetensors` file, at once or not at all; equal information gives equal bytes.

    A file of Fisher information is replaced, any other only with `replace`.

    Raises:
        StatisticsError: there is no layer.
        OutputError: there is a file of another kind.
        OrthomergeError: the path cannot be written.
    """
    path = Path(path)
    if not fisher:
        raise StatisticsError("no Fisher information to write: name at least one layer.")
    tensors = {name: value.detach().cpu().contiguous() for name, value in fisher.items()}
    meta = dataclasses.replace(meta, format=FORMAT)
    content = {
        "format": FORMAT,
        "meta": asdict(meta),
        "layers": {name: digest({name: value}) for name, value in tensors.items()},
    }
    _FILE.save(path, tensors, content, replace=replace)
    return path


def load_fisher(
    path: str | Path, *, adapter_sha256: str | None = None, model_sha256: str | None = None
) -> Fisher:
    """The Fisher information in a file, layer by layer when asked for.

    Args:
        path: a file of `save_fisher` or `orthomerge stats fisher`.
        adapter_sha256: the adapter it must be of, by the SHA-256 of its weights file.
        model_sha256: the base model it must be of.

    Raises:
        StatisticsError: no such file, none of ours, another format, a file that was cut or altered
            (a layer is checked when it is read), or one of another adapter or base model.
    """
    path = Path(path)
    FISHER.require(path)
    with _FILE.open(path) as stream:
        content = _FILE.metadata(path, stream)
        meta = _META.validate_python(content["meta"])
        digests = {str(k): str(v) for k, v in content["layers"].items()}
        if set(digests) != set(stream.keys()):
            raise ValueError("its layers are not those that were written")
    for what, mine, theirs in (
        ("adapter", meta.adapter_sha256, adapter_sha256),
        ("base model", meta.model_sha256, model_sha256),
    ):
        if None not in (mine, theirs) and mine != theirs:
            raise StatisticsError(
                f"'{path}' is the Fisher information of another {what} ({str(mine)[:12]}, not "
                f"{str(theirs)[:12]}): collect it on this one."
            )
    return Fisher(path, digests, meta)
