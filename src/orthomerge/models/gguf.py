"""GGUF files as base models: dequantised once to float32 into an ordinary model folder.

Transformers and the package `gguf` (the extra `[gguf]`) read the file. The folder is kept in the
cache under the file's hash, with a record of what it was made from.
"""

from __future__ import annotations

import importlib.util
import logging
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from orthomerge.errors import AssetError, reason
from orthomerge.io.documents import Unreadable, is_object, read_json
from orthomerge.io.files import atomic_path, file_sha256, fingerprint, known_sha256, write_json

RECORD = "dequantised.json"
SUFFIX = ".gguf"
_CONVERSION = 1  # raised when the same file would give other weights
_KEYS = {"file", "sha256", "conversion", "types", "files"}
_log = logging.getLogger(__name__)
_said: set[Path] = set()


def is_gguf(path: Path) -> bool:
    """Whether the path is an existing GGUF file."""
    return path.suffix == SUFFIX and path.is_file()


def dequantised(file: Path, folder: Path, *, fetch: bool = True) -> Path:
    """The model folder of a GGUF file: `folder`, made now where it is not there yet.

    Weights become float32, which holds every dequantised value exactly. The folder is written whole
    or not at all.

    Args:
        file: the GGUF file.
        folder: where the model folder is, or goes.
        fetch: whether it may be made; without, a folder that is not there is an error.

    Raises:
        AssetError: no package `gguf`, a file that cannot be read or holds no decoder, or a folder
            that was changed.
    """
    if not folder.is_dir():
        if not fetch:
            raise AssetError(f"'{file}' is not dequantised on this machine yet.")
        _need_gguf(file)
        from orthomerge.models.loading import quiet

        with quiet(), atomic_path(folder) as written:
            _convert(file, written)
    record = _record(folder)
    if folder not in _said:
        _said.add(folder)
        _log.info("%s: weights dequantised from %s to float32.", file.name, _types(record))
    return folder


def made_from(folder: Path) -> str | None:
    """The hash that identifies a folder that was dequantised; None for any other folder.

    It is made from the GGUF file's hash: what another version of Transformers writes into
    `config.json` does not make it another model.

    Raises:
        AssetError: a file in the folder is not the one that was written.
    """
    if not (folder / RECORD).is_file():
        return None
    record = _record(folder)
    for name, sha256 in cast(Mapping[str, str], record["files"]).items():
        path = folder / name
        if not path.is_file() or known_sha256(path) != sha256:
            raise AssetError(
                f"'{name}' in '{folder}' is not what was dequantised from {record['file']}: delete "
                "the folder and run again."
            )
    return fingerprint({"gguf": record["sha256"], "conversion": record["conversion"]})


def _record(folder: Path) -> dict[str, Any]:
    try:
        record = read_json(folder / RECORD)
        if not is_object(record) or not set(record) >= _KEYS:
            raise Unreadable("it is no such record")
    except (Unreadable, OSError) as problem:
        raise AssetError(
            f"'{folder / RECORD}' cannot be read ({problem}): delete the folder and run again."
        ) from problem
    return record


def _need_gguf(file: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise AssetError(
            f"'{file.name}' is a GGUF file, which the package gguf reads: pip install "
            "'orthomerge[gguf]'."
        )


def _convert(file: Path, folder: Path) -> None:
    """Write the dequantised model, its tokenizer, a card and the record into `folder`."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Older Transformers always dequantise, newer ones may keep the file's blocks on a GPU.
    kind: Any = getattr(transformers, "GgufConfig", None)
    plainly = {"quantization_config": kind(dequantize=True)} if kind else {}
    # Alone in a folder, so that no file beside it is read for it.
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / file.name).symlink_to(file.resolve())
        where: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False}
        try:
            types, licence = _described(file)
            model = cast(Any, AutoModelForCausalLM).from_pretrained(
                scratch, dtype=torch.float32, **plainly, **where
            )
            tokenizer = cast(Any, AutoTokenizer).from_pretrained(scratch, **where)
        # The reader raises what the bytes happen to break: each means that it is no such file.
        except Exception as problem:
            raise AssetError(
                f"'{file}' cannot be read as a GGUF file of a decoder: {reason(problem)}."
            ) from problem
    # The weights are quantised no more, whatever is left that says so.
    for owner in (model, model.config):
        for name in ("hf_quantizer", "quantization_method", "quantization_config"):
            if hasattr(owner, name):
                delattr(owner, name)
    model.is_quantized = False
    model.config.name_or_path = ""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    names = [path.name for path in sorted(folder.iterdir())]
    from huggingface_hub import ModelCard, ModelCardData

    about = ModelCardData(license=licence)
    text = f"Dequantised from `{file.name}` ({_listed(types)}) to float32."
    ModelCard(f"---\n{about}\n---\n\n{text}\n").save(folder / "README.md")
    write_json(
        folder / RECORD,
        {
            "file": file.name,
            "sha256": file_sha256(file),
            "conversion": _CONVERSION,
            "types": types,
            "licence": licence,
            "files": {name: file_sha256(folder / name) for name in names},
        },
    )


def _described(file: Path) -> tuple[dict[str, int], str | None]:
    """How many tensors are held in which type, and the licence that the file states."""
    import gguf  # pyright: ignore

    reader = cast(Any, gguf).GGUFReader(file)
    types = Counter(str(tensor.tensor_type.name) for tensor in reader.tensors)
    field = reader.get_field("general.license")
    return dict(types.most_common()), None if field is None else str(field.contents())


def _types(record: Mapping[str, Any]) -> str:
    return _listed(cast(Mapping[str, int], record["types"]))


def _listed(types: Mapping[str, int]) -> str:
    """The quantised types; float32, which most files keep for norms, only where it is alone."""
    return ", ".join([name for name in types if name != "F32"] or list(types))
