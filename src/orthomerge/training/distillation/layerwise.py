"""A merge from moments of layer inputs that are read off the running model, layer after layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from orthomerge.errors import AdapterError
from orthomerge.factors import LoraFactors, from_dense
from orthomerge.merging import SUM, MergeConfig, Update, plan_merge
from orthomerge.moments import Moment
from orthomerge.statistics import FeatureCollector
from orthomerge.training.distillation.batches import Place
from orthomerge.training.distillation.student import Classroom
from orthomerge.training.distillation.updates import Added, added


def merge_on_texts(
    room: Classroom,
    modules: Mapping[str, nn.Module],
    parts: Sequence[Mapping[str, LoraFactors]],
    texts: Sequence[Sequence[Place]],
    config: MergeConfig,
    *,
    layer_wise: bool,
) -> dict[str, Update]:
    """Merge by a method that reads moments, each adapter's of its own `texts`.

    `S_i = Σ_h h hᵀ / n` over the tokens h at the layer's input. With `layer_wise` the model carries
    the layers merged so far when that input is read, as it will when all are merged; without, it is
    the base. With `regmean` that is RegMean++, and RegMean. One pass up to the layer for each
    distinct input and text, or one in all.

    Args:
        room: the model, and the texts as tokens.
        modules: the model's layers by name.
        parts: each adapter's factors by layer.
        texts: each adapter's.
        config: the method, its weights and options.
        layer_wise: whether inputs are those of the model merged so far.

    Raises:
        AdapterError: an embedding among the layers, whose inputs have no moment.
        StatisticsError: a layer that does not run, or runs twice.
        MergeError: what the method refuses.

    Source: RegMean++, arXiv 2508.03121.
    """
    for name, module in modules.items():
        if isinstance(module, nn.Embedding):
            raise AdapterError(
                f"layer '{name}' is an embedding, whose inputs have no moment: begin from a method "
                "that needs none."
            )
    held = [_Held() for _ in parts]
    plan = plan_merge(parts, replace(config, rank=SUM), statistics=held)
    merged: dict[str, Update] = {}
    for group in _groups(room, modules, texts) if layer_wise else [list(modules)]:
        far = {n: u if isinstance(u, LoraFactors) else from_dense(u) for n, u in merged.items()}
        carried = added(far, room.device)
        read = {group[0]: modules[group[0]]} if layer_wise else modules
        for each, places in zip(held, texts, strict=True):
            found = _moments(room, read, places, carried)
            each.by_layer = {name: found.get(name, found[group[0]]) for name in group}
        merged |= {name: plan.merge(name).update for name in group}
    return {name: merged[name] for name in modules}


class _Held:
    """The moments of one adapter's texts, as a merging method asks for them."""

    by_layer: dict[str, Moment]

    def moment(self, layer: str) -> Moment:
        return self.by_layer[layer]


def _groups(
    room: Classroom, modules: Mapping[str, nn.Module], texts: Sequence[Sequence[Place]]
) -> list[list[str]]:
    """The layers in the order in which they run; those that read one tensor together."""
    collector = FeatureCollector(modules)
    _discover(room, collector, texts[0])
    groups: dict[str, list[str]] = {}
    for name, lead in collector.result()[1].items():
        groups.setdefault(lead, []).append(name)
    return list(groups.values())


def _moments(
    room: Classroom,
    modules: Mapping[str, nn.Module],
    places: Sequence[Place],
    carried: Mapping[str, Added],
) -> dict[str, Moment]:
    """The moments at layers' inputs, over texts, of the model with an update."""
    collector = FeatureCollector(modules)
    _discover(room, collector, places)
    with torch.no_grad():
        for number, chunk in enumerate(room.chunks(places)):
            inputs = room.inputs(chunk)
            with collector.watch(_masks(inputs), number, stop=True):
                room.states(inputs, carried)
    moments, leads = collector.result()
    return {name: moments[lead] for name, lead in leads.items()}


def _discover(room: Classroom, collector: FeatureCollector, places: Sequence[Place]) -> None:
    inputs = room.inputs(places[:1])
    with torch.no_grad(), collector.discover(_masks(inputs)):
        room.states(inputs, {})


def _masks(inputs: Mapping[str, Tensor]) -> list[Tensor | None]:
    return [inputs.get("attention_mask"), inputs.get("decoder_attention_mask")]
