"""What `eval` scores: an adapter on its base, or a model as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orthomerge.errors import AdapterError, AssetError, RecipeError

if TYPE_CHECKING:
    from torch import Tensor

    from orthomerge.adapters import Adapter
    from orthomerge.cli._rows import Rows
    from orthomerge.models.assets import ResolvedModel
    from orthomerge.records import Learnt
    from orthomerge.tasks import Task


@dataclass(frozen=True)
class Subject:
    """A model and perhaps an adapter on it; `named` is what the user called it."""

    named: str
    found: ResolvedModel
    adapter: Adapter | None
    folder: Path | None
    task_type: str | None
    learnt: Sequence[Learnt]

    @property
    def layers(self) -> Mapping[str, Any]:
        """The adapter's layers; none of a model as it is."""
        return self.adapter.layers if self.adapter else {}

    def require_form(self, form: str) -> None:
        """Refuse a form that the adapter is not made for.

        Raises:
            AdapterError: a classifier asked for words, or a language model for a head's classes.
        """
        from orthomerge.adapters import require_form

        if self.adapter is not None:
            require_form(self.adapter, form)

    def head(self, named: Path | None, about: Task) -> Mapping[str, Tensor] | None:
        """The head that was named, else the task's beside a merge, else the adapter's or model's.

        None where the model brings its own.

        Raises:
            AdapterError: there is none, or the model's own is for other labels.
        """
        from orthomerge.adapters import read_head
        from orthomerge.io.files import slug
        from orthomerge.io.names import HEAD, HEADS

        if named:
            return read_head(named)
        if self.folder is not None:
            kept = self.folder / HEADS / f"{slug(about.name)}{HEAD}"
            if kept.is_file():
                return read_head(kept)
        if self.adapter is not None:
            return self.adapter.modules
        self._require_own_head(about)
        return None

    def _require_own_head(self, about: Task) -> None:
        from orthomerge.models.loading import load_config

        config = load_config(self.found.path_or_id)
        if not _is_classifier(config):
            raise AdapterError(
                f"'{self.named}' is a model without a head for '{about.name}': name one with "
                "--head (an adapter that was trained for the task), or ask a language model with "
                "--form text."
            )
        if config.num_labels != about.outputs:
            raise AdapterError(
                f"the head of '{self.named}' has {config.num_labels} outputs, task '{about.name}' "
                f"needs {about.outputs}: name its own with --head."
            )
        order = [str(config.id2label[i]).lower() for i in range(config.num_labels)]
        mine = [label.lower() for label in about.labels]
        if order != mine and sorted(order) == sorted(mine):
            raise AdapterError(
                f"the head of '{self.named}' has its labels in the order {', '.join(order)}, task "
                f"'{about.name}' in the order {', '.join(mine)}: its scores would be of other "
                "labels."
            )


def find_subject(named: str, base: str | None) -> Subject:
    """The adapter or the model that the user named.

    Raises:
        AdapterError, AssetError: neither of the two.
        RecipeError: a base beside a model.
    """
    from orthomerge.io.files import local
    from orthomerge.models.assets import is_local
    from orthomerge.models.packaged import carrying

    place = local(named)
    adapter = (place / "adapter_config.json").is_file()
    if not adapter and (is_local(named) or carrying(named)):
        return _model(named, base)
    from orthomerge.adapters import align_adapters, base_of, read_adapter, require_runnable
    from orthomerge.records import learnt_by

    try:
        (read,) = align_adapters([read_adapter(named, base=base)], base=base)
    except AdapterError:
        if adapter or place.exists():
            raise
        try:  # an id of the hub may be an adapter's or a model's
            return _model(named, base)
        except AssetError:
            pass
        raise
    require_runnable(read)
    found = base_of(read, base)
    kind = read.config.get("task_type")
    return Subject(named, found, read, read.path, kind, learnt_by(read.path))


def learnt_in(subject: Subject, found: Rows) -> Learnt | None:
    """How the adapter learnt the task of these rows, if its record says so."""
    from orthomerge.records import learnt_for

    return learnt_for(subject.learnt, found.task.name, found.task.labels)


def _model(named: str, base: str | None) -> Subject:
    from orthomerge.io.files import local
    from orthomerge.models.assets import resolve_model
    from orthomerge.models.loading import language_task_type, load_config
    from orthomerge.records import learnt_by

    if base is not None:
        raise RecipeError(f"'{named}' is a model and no adapter: leave out --base.")
    folder = local(named) if local(named).is_dir() else None
    if folder is not None and not (folder / "config.json").is_file():
        from orthomerge.adapters import read_adapter

        read_adapter(named)  # says what the folder is instead
    found = resolve_model(named)
    kind: str | None = None
    if not _is_classifier(load_config(found.path_or_id)):
        try:
            kind = language_task_type(found.path_or_id)
        except AssetError:  # it writes no text
            kind = None
    return Subject(named, found, None, folder, kind, learnt_by(folder))


def _is_classifier(config: Any) -> bool:
    """Whether the checkpoint brings the head of a sequence classifier."""
    kinds: Sequence[str] = config.architectures or ()
    return any(kind.endswith("ForSequenceClassification") for kind in kinds)
