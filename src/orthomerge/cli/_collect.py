"""What `orthomerge stats` does between texts and statistics: the base loaded, the passes run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from orthomerge.adapters import default_targets
from orthomerge.cli._processes import Process
from orthomerge.cli._progress import adding, work_bar
from orthomerge.errors import RecipeError
from orthomerge.models.assets import ResolvedModel, resolve_model
from orthomerge.models.loading import (
    exact_device,
    in_precision,
    language_task_type,
    load_backbone,
    load_tokenizer,
    tokenizer_hash,
)
from orthomerge.prompting import Wording
from orthomerge.statistics import Statistics, batches, collect_statistics, target_layers

if TYPE_CHECKING:
    from orthomerge.moments import Representation
    from orthomerge.tasks import Prompt


class Reading(NamedTuple):
    """How texts are read: at which layers, as what rows, in which words; `task` is their name.

    Without `targets` they are the layers that PEFT adapts in such a model.
    """

    targets: list[str] | None
    granularity: str
    representation: Representation
    prompt: Prompt | None
    max_length: int
    batch_size: int
    data: str
    task: str


class Base(NamedTuple):
    """A base model that is ready to read."""

    found: ResolvedModel
    backbone: Any
    tokenizer: Any
    targets: list[str]


def load_base(
    model: str, how: Reading, process: Process, device_map: str | None, precision: str = "float32"
) -> Base:
    """The base on this process's device, or spread as `device_map` says.

    Raises:
        AssetError: no such model.
        RecipeError: a base that writes no text for a prompt, or a device map that is not JSON.
        UnknownNameError: a target matches no layer.
    """
    found = resolve_model(model)
    if how.prompt:
        language_task_type(found.path_or_id)  # refuses what writes no text
    backbone = load_backbone(found.path_or_id, device_map=_device_map(device_map))
    if device_map is None:
        backbone = backbone.to(process.device or exact_device())
    backbone = in_precision(backbone, precision)
    targets = how.targets or default_targets(backbone)
    target_layers(backbone, targets)
    return Base(found, backbone, load_tokenizer(found.path_or_id), targets)


def measured(
    base: Base, texts: Sequence[tuple[str, str | None]], how: Reading, process: Process
) -> Statistics:
    """The statistics over the texts; see `collect_statistics`."""
    tokenizer, prompt = base.tokenizer, how.prompt
    if prompt:
        wording = Wording.of(prompt, tokenizer, base.backbone.config, how.max_length)
        read: Any = wording.batches(texts, batch_size=how.batch_size)
    else:
        read = batches(texts, tokenizer, batch_size=how.batch_size, max_length=how.max_length)
    with work_bar(f"statistics of {how.data}") as progress:
        advance = adding(progress, len(texts))
        return collect_statistics(
            base.backbone,
            read,
            base.targets,
            granularity=how.granularity,
            representation=how.representation,
            task=how.task,
            model_id=base.found.name,
            model_sha256=base.found.sha256,
            tokenizer_hash=tokenizer_hash(tokenizer),
            prompt=prompt.fingerprint if prompt else None,
            max_length=how.max_length,
            # The other processes are about as far.
            progress=lambda done: advance(done * process.world),
        )


def _device_map(text: str | None) -> Any:
    """A device map as Transformers takes it.

    Raises:
        RecipeError: JSON that is not an object.
    """
    import json

    if text is None or not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except ValueError as problem:
        raise RecipeError(
            f"""device map '{text}' is not JSON ({problem}): write it as '{{"": "cpu"}}'."""
        ) from problem
