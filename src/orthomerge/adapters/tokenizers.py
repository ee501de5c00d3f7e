"""The tokenizer next to adapters: tokens that were added in training are in it alone."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from orthomerge.adapters.files import Adapter
from orthomerge.adapters.hub import TOKENIZER
from orthomerge.errors import AdapterError, OrthomergeWarning
from orthomerge.io.documents import JSON_BYTES, is_array, is_object, read_text
from orthomerge.io.files import copy_inside, known_sha256

_TOKENIZER, _SETTINGS, _ADDED = "tokenizer.json", "tokenizer_config.json", "added_tokens.json"
_TEMPLATE, _TEMPLATES = "chat_template.jinja", "additional_chat_templates"
_VOCABULARIES = TOKENIZER[6:]
_MARKS = ("bos_token", "eos_token", "pad_token", "chat_template")


class _Tokens(NamedTuple):
    """What a tokenizer makes of text: a hash of its vocabulary, and the added tokens by id."""

    vocabulary: str
    added: Mapping[int, str]


def tokenizer_of(adapters: Sequence[Adapter]) -> Path | None:
    """The folder whose tokenizer goes with a merge of these adapters; None where none has one.

    The one with the most added tokens, where the others have no token of another meaning. Chat
    templates and marks that differ are a warning. Where tokens clash there is a warning and no
    tokenizer, since the base's own serves all, unless an adapter has embeddings of added tokens.

    Raises:
        AdapterError: tokens that clash, and rows for them; or a file that cannot be read.
    """
    owners = [a for a in adapters if a.path is not None and _has_tokenizer(a.path)]
    found = {a.called: (a.path, _tokens(a.path)) for a in owners if a.path is not None}
    if not found:
        return None
    chosen = max(found, key=lambda name: len(found[name][1].added))
    folder, tokens = found[chosen]
    for name, (other, theirs) in found.items():
        clash = _clash(tokens, theirs)
        if clash is None:
            _compare_marks(chosen, folder, name, other)
            continue
        said = f"the tokenizers beside '{chosen}' and '{name}' differ ({clash})"
        if any(a.copies for a in adapters):
            raise AdapterError(
                f"{said}, and so do the rows of the embeddings: add the same tokens to the base "
                "before each is trained, or merge adapters of one tokenizer."
            )
        warnings.warn(f"{said}: none goes with the merge.", OrthomergeWarning, stacklevel=3)
        return None
    return folder


def put_tokenizer(source: Path, folder: Path) -> None:
    """The tokenizer of `source` in the place of the one in `folder`."""
    for name in TOKENIZER:
        (folder / name).unlink(missing_ok=True)
        if (source / name).is_file():
            copy_inside(source / name, folder / name, source)
    for template in sorted((source / _TEMPLATES).glob("*.jinja")):
        (folder / _TEMPLATES).mkdir(exist_ok=True)
        copy_inside(template, folder / _TEMPLATES / template.name, source)


def warn_of_tokens_without_row(source: Path, rows: int | None) -> None:
    """Say that a tokenizer has tokens for which the model has no embedding."""
    added = _tokens(source).added
    if rows is not None and (last := max(added, default=0)) >= rows:
        warnings.warn(
            f"the tokenizer in '{source}' has the token '{added[last]}' ({last}) and the model has "
            f"{rows} rows of embeddings: the adapters were saved without the rows of added tokens; "
            "save them with save_embedding_layers=True.",
            OrthomergeWarning,
            stacklevel=3,
        )


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (_TOKENIZER, *_VOCABULARIES))


def _tokens(folder: Path) -> _Tokens:
    if (folder / _TOKENIZER).is_file():
        return _fast_tokens(folder / _TOKENIZER, known_sha256(folder / _TOKENIZER))
    files = [folder / name for name in _VOCABULARIES if (folder / name).is_file()]
    hashes = " ".join(f"{file.name} {known_sha256(file)}" for file in files)
    listed = _object(folder / _SETTINGS).get("added_tokens_decoder")
    added = {
        int(number): str(token.get("content"))
        for number, token in (listed if is_object(listed) else {}).items()
        if is_object(token)
    }
    return _Tokens(hashes, added | {int(n): t for t, n in _object(folder / _ADDED).items()})


@lru_cache(maxsize=32)
def _fast_tokens(file: Path, _: str) -> _Tokens:
    read = _object(file)
    model, listed = read.get("model"), read.get("added_tokens")
    vocabulary = json.dumps(model.get("vocab") if is_object(model) else None, sort_keys=True)
    added = {
        int(token["id"]): str(token["content"])
        for token in (listed if is_array(listed) else ())
        if is_object(token)
    }
    return _Tokens(sha256(vocabulary.encode()).hexdigest(), added)


def _object(file: Path) -> Mapping[str, Any]:
    if not file.is_file():
        return {}
    try:
        # Not parse_json: a tokenizer without a longest input says 10^30, more than 64 bits hold.
        found: object = json.loads(read_text(file, JSON_BYTES))
    except (ValueError, RecursionError, OSError) as problem:
        raise AdapterError(f"'{file}' cannot be read as JSON: {problem}.") from problem
    if not is_object(found):
        raise AdapterError(f"'{file}' is no file of a tokenizer: save it again.")
    return found


def _clash(one: _Tokens, other: _Tokens) -> str | None:
    """What two tokenizers understand differently."""
    if one.vocabulary != other.vocabulary:
        return "in their vocabularies"
    for number, token in other.added.items():
        if one.added.get(number, token) != token:
            return f"the token {number} is '{one.added[number]}' and '{token}'"
    places = {token: number for number, token in one.added.items()}
    for number, token in other.added.items():
        if places.get(token, number) != number:
            return f"the token '{token}' is {places[token]} and {number}"
    return None


def _compare_marks(chosen: str, folder: Path, name: str, other: Path) -> None:
    one, two = (
        {key: _object(place / _SETTINGS).get(key) for key in _MARKS}
        | {_TEMPLATE: _text(place / _TEMPLATE)}
        for place in (folder, other)
    )
    differ = [key for key in one if one[key] != two[key]]
    if differ:
        warnings.warn(
            f"the tokenizers beside '{chosen}' and '{name}' differ in {', '.join(differ)}: the "
            f"merge takes that of '{chosen}'.",
            OrthomergeWarning,
            stacklevel=4,
        )


def _text(file: Path) -> str | None:
    return file.read_text(encoding="utf-8") if file.is_file() else None
