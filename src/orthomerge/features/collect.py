"""Streaming the inputs of chosen layers into second moments, and leaving no trace in the model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from orthomerge.errors import StatisticsError, UnknownNameError, nearest, unknown_name
from orthomerge.features.distributed import process_rank, reduce_to_first
from orthomerge.features.statistics import Statistics, StatisticsMeta, describe_model
from orthomerge.moments import MeanMoment, Moment, Representation, choose

GRANULARITIES = ("token", "sample", "task_mean")


def trunk(model: nn.Module) -> nn.Module:
    """The model below its head, so that a layer has one name whatever head is on top."""
    inner = getattr(model, "get_base_model", lambda: model)()
    return getattr(inner, "base_model", inner)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of the trunk that LoRA can adapt, `nn.Linear` and GPT-2's `Conv1D`, by name."""
    found: dict[str, nn.Module] = {}
    for name, module in trunk(model).named_modules():
        base = getattr(module, "base_layer", module)
        if (name and isinstance(base, nn.Linear)) or type(base).__name__ == "Conv1D":
            found[name.removesuffix(".base_layer")] = module
    return {n: m for n, m in found.items() if ".lora_" not in n}


def target_layers(model: nn.Module, targets: Sequence[str]) -> dict[str, nn.Module]:
    """The layers whose name ends in one of `targets`, matched as PEFT's `target_modules` are.

    Raises:
        UnknownNameError: a target matches no layer; the message names the model's linear layers.
    """
    layers = linear_layers(model)
    chosen: dict[str, nn.Module] = {}
    for target in targets:
        hits = {n: m for n, m in layers.items() if n == target or n.endswith(f".{target}")}
        if not hits:
            ends = sorted({n.rsplit(".", 1)[-1] for n in layers})
            full = sorted({re.sub(r"\.\d+\.", ".*.", n) for n in layers})
            close = nearest(target, ends)
            hint = f"did you mean '{close}'? " if close else ""
            raise UnknownNameError(
                f"no layer '{target}' in {type(model).__name__}: {hint}its linear layers are "
                f"{', '.join(full)}."
            )
        chosen.update(hits)
    order = list(layers)
    return dict(sorted(chosen.items(), key=lambda item: order.index(item[0])))


class _Input:
    """One distinct layer input: the layers that read it, and the moment it feeds."""

    def __init__(self, lead: str, features: Tensor) -> None:
        self.lead = lead
        self.layers = [lead]
        self.width = features.shape[-1]
        self.source = 0
        self.moment: Moment | None = None
        self.samples = 0
        # Held while layers of one forward pass may still read it, to see that it is the same one.
        self.current: Tensor | None = None
        self.waiting = 0


def _identity(features: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    """What tells one live tensor from another, whatever views were made of it on the way."""
    return features.data_ptr(), features.shape, features.stride()


def _outputs(layer: nn.Module) -> int:
    base = getattr(layer, "base_layer", layer)
    width = getattr(base, "out_features", None) or getattr(base, "nf", None)
    return int(width) if width else 0


class FeatureCollector:
    """Second moments of the inputs of `layers`, updated by running the model under `watch`.

    Layers that read the very same tensor in a forward pass (q, k and v; gate and up; every k and v
    of a cross-attention) share one moment. Which do is found under `discover`, on a sample small
    enough to hold all its features, and checked in every pass.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        granularity: str = "token",
        representation: Representation | None = None,
    ) -> None:
        if granularity not in GRANULARITIES:
            raise unknown_name("granularity", granularity, GRANULARITIES, error=StatisticsError)
        self.granularity = granularity
        self._representation = (representation or Representation()).check()
        self._layers = dict(layers)
        self._inputs: dict[str, _Input] = {}
        self._kinds: dict[str, str] = {}
        self._masks: list[Bool[Tensor, "batch length"]] = []
        self._draw = 0

    @property
    def discovered(self) -> bool:
        """Whether the distinct inputs are known."""
        return bool(self._inputs)

    @contextmanager
    def discover(self, masks: Sequence[Tensor | None]) -> Iterator[None]:
        """Hooks on for one small forward pass that tells which layers read one tensor.

        `masks` are those of that pass, of different lengths where there are two, so that what
        reads the encoder can be told from what reads the decoder.

        Raises:
            StatisticsError: a layer that does not run, or runs twice.
        """
        held: dict[str, Tensor] = {}

        def keep(name: str, features: Tensor) -> None:
            if name in held:
                raise StatisticsError(
                    f"layer '{name}' ran twice in one forward pass: weights shared between "
                    "depths are not supported; leave it out of the targets."
                )
            held[name] = features.detach()

        with self._hooks(keep):
            yield
        missing = [n for n in self._layers if n not in held]
        if missing:
            raise StatisticsError(
                f"layer '{missing[0]}' did not run on this data: leave it out of the targets."
            )
        shapes = [m.shape for m in masks if m is not None]
        known: dict[tuple, _Input] = {}
        for name, features in held.items():
            key = _identity(features)
            if key in known:
                known[key].layers.append(name)
            else:
                known[key] = _Input(name, features)
                read = [i for i, shape in enumerate(shapes) if shape == features.shape[:-1]]
                known[key].source = read[0] if read else 0
            self._inputs[name] = known[key]
        outputs = {
            i.lead: (i.width, sum(_outputs(self._layers[n]) for n in i.layers))
            for i in known.values()
        }
        self._kinds = choose(outputs, self._representation)

    @contextmanager
    def watch(self, masks: Sequence[Tensor | None], draw: int = 0) -> Iterator[None]:
        """Hooks on for one forward pass; `masks` mark real positions, 1 or True, padding 0.

        `draw` is the number of the batch, by which a representation that samples draws. Hooks are
        gone and held activations dropped when the block ends, however it ends.
        """
        self._masks = [m.bool() for m in masks if m is not None]
        self._draw = draw
        try:
            with self._hooks(self._keep):
                yield
        finally:
            self._masks = []
            for item in self._inputs.values():
                item.current = None

    @contextmanager
    def _hooks(self, keep: Callable[[str, Tensor], None]) -> Iterator[None]:
        def hook(name: str) -> Callable[..., None]:
            def read(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                keep(name, args[0] if args else next(iter(kwargs.values())))

            return read

        handles = [
            module.register_forward_pre_hook(hook(name), with_kwargs=True)
            for name, module in self._layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, name: str, features: Tensor) -> None:
        item = self._inputs[name]
        if name == item.lead:
            self._take(item, features)
            item.waiting = len(item.layers) - 1
            item.current = features if item.waiting else None
            return
        if item.current is None or _identity(item.current) != _identity(features):
            raise StatisticsError(
                f"layers '{item.lead}' and '{name}' read one tensor in the first batch and "
                "different ones now: name them in separate runs."
            )
        item.waiting -= 1
        if not item.waiting:
            item.current = None

    def _mask_for(self, item: _Input, features: Tensor) -> Tensor | None:
        if features.ndim < 3 or not self._masks:
            return None
        mask = self._masks[min(item.source, len(self._masks) - 1)]
        if mask.shape != features.shape[:-1]:
            fitting = [m for m in self._masks if m.shape == features.shape[:-1]]
            if not fitting:
                raise StatisticsError(
                    f"layer '{item.lead}' reads {list(features.shape)}, which no attention mask "
                    f"fits ({[list(m.shape) for m in self._masks]}): padding could not be told "
                    "apart."
                )
            mask = fitting[0]
        return mask.to(features.device)

    def _take(self, item: _Input, features: Float[Tensor, "batch *length d_in"]) -> None:
        mask = self._mask_for(item, features)
        item.samples += features.shape[0]
        if self.granularity == "sample" and features.ndim >= 3:
            wide = features.double()
            if mask is None:
                rows = wide.flatten(1, -2).mean(dim=1)
            else:
                weights = mask.to(wide)
                rows = (wide * weights[..., None]).sum(dim=1) / weights.sum(dim=1)[:, None]
        else:
            rows = features.reshape(-1, item.width) if mask is None else features[mask]
        if item.moment is None:
            item.moment = self._new(item)
        try:
            item.moment.update(rows, self._draw)
        except StatisticsError as problem:
            raise StatisticsError(f"layer '{item.lead}': {problem}") from problem

    def _new(self, item: _Input) -> Moment:
        if self.granularity == "task_mean":
            return MeanMoment(item.width)
        return self._representation.new(self._kinds[item.lead], item.width)

    def result(self) -> tuple[dict[str, Moment], dict[str, str], int]:
        """The moments by lead layer, every layer's lead, and the number of samples seen.

        Raises:
            StatisticsError: nothing was discovered.
        """
        if not self._inputs:
            raise StatisticsError("no sample was seen: the data is empty.")
        moments = {
            i.lead: i.moment if i.moment is not None else self._new(i)
            for i in self._inputs.values()
        }
        owners = {layer: item.lead for layer, item in self._inputs.items()}
        return moments, owners, next(iter(self._inputs.values())).samples


def collect_statistics(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]],
    target_modules: Sequence[str],
    *,
    granularity: str = "token",
    representation: Representation | None = None,
    task: str | None = None,
    model_id: str | None = None,
    model_sha256: str | None = None,
    tokenizer_hash: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Statistics:
    """Second moments of the inputs of the target layers over unlabelled batches.

    The base runs as it is, in eval mode and without gradients; a PEFT model runs with its adapters
    switched off. Padding (`attention_mask` 0) is never counted. The result does not depend on
    batch size or padding side beyond the model's own rounding.

    In a job of several processes (torch.distributed is initialised, as by `accelerate launch`)
    process p of P runs batches p, p + P, ...; one reduction at the end gives process 0 the
    statistics over all of them. The others get their own part.

    Args:
        model: any Transformers model, or a PEFT model on top of one.
        dataloader: batches of model inputs, with `attention_mask`; a `labels` entry is ignored.
            Every process is given all batches.
        target_modules: names as in PEFT's `target_modules`.
        granularity: "token" (each real token a row), "sample" (each sequence's masked mean a row)
            or "task_mean" (one row, the mean over all real tokens).
        representation: how moments are held; by default chosen by width and memory.
        task: the name that errors give these features.
        model_id, model_sha256, tokenizer_hash: what to remember about the model.
        progress: called with the number of samples after each batch.

    Raises:
        UnknownNameError: a target matches no layer.
        StatisticsError: no samples, NaN features (with layer, task and row count), or a layer that
            does not run.
    """
    layers = target_layers(model, target_modules)
    collector = FeatureCollector(layers, granularity, representation)
    device = next(model.parameters()).device
    runner = trunk(model)
    was_training = model.training
    rank, world = process_rank()
    model.eval()
    try:
        with _adapters_off(model), torch.no_grad():
            for number, batch in enumerate(dataloader):
                mine = number % world == rank
                if not mine and collector.discovered:
                    continue
                inputs = _inputs_of(runner, batch, device)
                if not collector.discovered:
                    small, masks = _one_sample(inputs)
                    with collector.discover(masks):
                        runner(**small)
                if not mine:
                    continue
                with collector.watch(_masks_of(inputs), draw=number):
                    runner(**inputs)
                if progress is not None:
                    progress(len(next(iter(inputs.values()))))
        moments, owners, samples = collector.result()
        moments, samples = reduce_to_first(moments, samples)
    except StatisticsError as problem:
        name = f"task '{task}', " if task else ""
        raise StatisticsError(f"{name}{problem}") from problem
    finally:
        model.train(was_training)
    meta = StatisticsMeta(
        **describe_model(model, model_id),
        model_sha256=model_sha256,
        tokenizer_hash=tokenizer_hash,
        target_modules=sorted(target_modules),
        granularity=granularity,
        samples=samples,
    )
    return Statistics(moments=moments, layers=owners, meta=meta)


@contextmanager
def _adapters_off(model: nn.Module) -> Iterator[None]:
    """A PEFT model's own switch, by duck typing: this module must not import peft."""
    disable = getattr(model, "disable_adapter", None)
    if disable is None:
        yield
    else:
        with disable():
            yield


def _inputs_of(runner: nn.Module, batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch on the model's device; a T5 without decoder inputs reads its own text, shifted.

    That is what `T5ForSequenceClassification` does, on which the paper trains.
    """
    inputs = {
        k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items() if k != "labels"
    }
    shift = getattr(runner, "_shift_right", None)
    if shift is not None and "decoder_input_ids" not in inputs and "input_ids" in inputs:
        inputs["decoder_input_ids"] = shift(inputs["input_ids"])
        mask = inputs.get("attention_mask")
        if mask is not None:  # the start token is real, the last text token drops out
            start = torch.ones_like(mask[:, :1])
            inputs["decoder_attention_mask"] = torch.cat([start, mask[:, :-1]], dim=1)
    return inputs


def _masks_of(inputs: Mapping[str, Any]) -> list[Tensor | None]:
    return [inputs.get("attention_mask"), inputs.get("decoder_attention_mask")]


def _one_sample(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], list[Tensor | None]]:
    """The first sample alone, its decoder part shorter than its encoder part by one position."""
    size = len(next(iter(inputs.values())))
    small = {
        k: v[:1] if isinstance(v, Tensor) and v.ndim and len(v) == size else v
        for k, v in inputs.items()
    }
    if "decoder_input_ids" in small and "input_ids" in small:
        length = small["input_ids"].shape[1]
        if small["decoder_input_ids"].shape[1] == length and length > 1:
            for name in ("decoder_input_ids", "decoder_attention_mask"):
                if name in small:
                    small[name] = small[name][:, :-1]
    return small, _masks_of(small)
