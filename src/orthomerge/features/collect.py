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
from orthomerge.features.second_moment import SecondMoment
from orthomerge.features.statistics import Statistics, StatisticsMeta, describe_model

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


class _Reader:
    """One distinct layer input: the layers that read it and the moment it feeds."""

    def __init__(self, lead: str) -> None:
        self.lead = lead
        self.layers = [lead]
        self.moment: SecondMoment | None = None
        self.mean_sum: Tensor | None = None
        self.mean_count = 0
        self.samples = 0
        self.current: Tensor | None = None


def _identity(features: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    """What tells one live tensor from another, whatever views were made of it on the way."""
    return features.data_ptr(), features.shape, features.stride()


class FeatureCollector:
    """Second moments of the inputs of `layers`, updated by running the model under `watch`.

    Layers that read the very same tensor in a forward pass (q, k and v; gate and up) share one
    moment; this is found by identity in the first batch and checked in every later one.
    """

    def __init__(self, layers: Mapping[str, nn.Module], granularity: str = "token") -> None:
        if granularity not in GRANULARITIES:
            raise unknown_name("granularity", granularity, GRANULARITIES, error=StatisticsError)
        self.granularity = granularity
        self._layers = dict(layers)
        self._readers: dict[str, _Reader] | None = None
        self._first: dict[str, Tensor] = {}
        self._masks: list[Bool[Tensor, "batch length"]] = []

    @contextmanager
    def watch(self, masks: Sequence[Tensor | None]) -> Iterator[None]:
        """Hooks on for one forward pass; `masks` mark real positions, 1 or True, padding 0.

        Hooks are gone and held activations dropped when the block ends, however it ends.
        """
        self._masks = [m.bool() for m in masks if m is not None]
        handles = [
            module.register_forward_pre_hook(self._hook(name), with_kwargs=True)
            for name, module in self._layers.items()
        ]
        try:
            yield
            if self._readers is None:
                self._discover()
        finally:
            for handle in handles:
                handle.remove()
            self._first = {}
            for reader in (self._readers or {}).values():
                reader.current = None

    def _hook(self, name: str) -> Callable[..., None]:
        def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            features = args[0] if args else next(iter(kwargs.values()))
            if self._readers is None:
                if name in self._first:
                    raise StatisticsError(
                        f"layer '{name}' ran twice in one forward pass: weights shared between "
                        "depths are not supported; leave it out of the targets."
                    )
                self._first[name] = features.detach()
                return
            reader = self._readers.get(name)
            if reader is None:
                raise StatisticsError(
                    f"layer '{name}' ran in this batch but not in the first one: its statistics "
                    "would be incomplete; leave it out of the targets."
                )
            if name == reader.lead:
                reader.current = features
                self._take(reader, features)
            elif reader.current is None or _identity(reader.current) != _identity(features):
                raise StatisticsError(
                    f"layers '{reader.lead}' and '{name}' read one tensor in the first batch and "
                    "different ones now: name them in separate runs."
                )

        return keep

    def _discover(self) -> None:
        by_tensor: dict[tuple, _Reader] = {}
        readers: dict[str, _Reader] = {}
        originals: dict[tuple, Tensor] = {}
        for name, features in self._first.items():
            key = _identity(features)
            if key in by_tensor:
                by_tensor[key].layers.append(name)
            else:
                by_tensor[key] = _Reader(name)
                originals[key] = features
            readers[name] = by_tensor[key]
        missing = [n for n in self._layers if n not in readers]
        if missing:
            raise StatisticsError(
                f"layer '{missing[0]}' did not run on this data: leave it out of the targets."
            )
        self._readers = readers
        for key, reader in by_tensor.items():
            self._take(reader, originals[key])

    def _mask_for(self, reader: _Reader, features: Tensor) -> Tensor | None:
        if features.ndim < 3 or not self._masks:
            return None
        fitting = [m for m in self._masks if m.shape == features.shape[:-1]]
        if not fitting:
            raise StatisticsError(
                f"layer '{reader.lead}' reads {list(features.shape)}, which no attention mask "
                f"fits ({[list(m.shape) for m in self._masks]}): padding could not be told apart."
            )
        # Encoder and decoder may be equally long; the decoder's mask is the later one.
        in_decoder = "decoder" in reader.lead and "EncDecAttention" not in reader.lead
        return fitting[-1] if in_decoder else fitting[0]

    def _take(self, reader: _Reader, features: Float[Tensor, "batch *length d_in"]) -> None:
        width = features.shape[-1]
        mask = self._mask_for(reader, features)
        reader.samples += features.shape[0]
        if self.granularity == "sample" and features.ndim >= 3:
            wide = features.double()
            if mask is None:
                rows = wide.flatten(1, -2).mean(dim=1)
            else:
                weights = mask.to(wide)
                rows = (wide * weights[..., None]).sum(dim=1) / weights.sum(dim=1)[:, None]
        else:
            rows = features.reshape(-1, width) if mask is None else features[mask]
        if self.granularity == "task_mean":
            total = rows.double().sum(dim=0)
            reader.mean_sum = total if reader.mean_sum is None else reader.mean_sum + total
            reader.mean_count += rows.shape[0]
            return
        if reader.moment is None:
            reader.moment = SecondMoment(width)
        reader.moment.update(rows)

    def result(self) -> tuple[dict[str, SecondMoment], dict[str, str], int]:
        """The moments by lead layer, every layer's lead, and the number of samples seen.

        Raises:
            StatisticsError: nothing was watched.
        """
        if not self._readers:
            raise StatisticsError("no sample was seen: the data is empty.")
        moments: dict[str, SecondMoment] = {}
        for reader in self._readers.values():
            if reader.lead in moments:
                continue
            if reader.mean_sum is not None:
                mean = reader.mean_sum / reader.mean_count
                moments[reader.lead] = SecondMoment(len(mean)).update(mean[None, :])
            elif reader.moment is not None:
                moments[reader.lead] = reader.moment
        owners = {layer: reader.lead for layer, reader in self._readers.items()}
        return moments, owners, next(iter(self._readers.values())).samples


def collect_statistics(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]],
    target_modules: Sequence[str],
    *,
    granularity: str = "token",
    model_id: str | None = None,
    model_sha256: str | None = None,
    tokenizer_hash: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Statistics:
    """Second moments of the inputs of the target layers over unlabelled batches.

    The base runs as it is, in eval mode and without gradients; a PEFT model runs with its adapters
    switched off. Padding (`attention_mask` 0) is never counted. The result does not depend on
    batch size or padding side beyond the model's own rounding.

    Args:
        model: any Transformers model, or a PEFT model on top of one.
        dataloader: batches of model inputs, with `attention_mask`; a `labels` entry is ignored.
        target_modules: names as in PEFT's `target_modules`.
        granularity: "token" (each real token a row), "sample" (each sequence's masked mean a row)
            or "task_mean" (one row, the mean over all real tokens).
        model_id, model_sha256, tokenizer_hash: what to remember about the model.
        progress: called with the number of samples after each batch.

    Raises:
        UnknownNameError: a target matches no layer.
        StatisticsError: no samples, NaN features, or a layer that does not run.
    """
    layers = target_layers(model, target_modules)
    collector = FeatureCollector(layers, granularity)
    device = next(model.parameters()).device
    runner = trunk(model)
    was_training = model.training
    seen = 0
    model.eval()
    try:
        with _adapters_off(model), torch.no_grad():
            for batch in dataloader:
                inputs = {
                    k: v.to(device) if isinstance(v, Tensor) else v
                    for k, v in batch.items()
                    if k != "labels"
                }
                masks = [inputs.get("attention_mask"), inputs.get("decoder_attention_mask")]
                with collector.watch(masks):
                    runner(**inputs)
                size = len(next(iter(inputs.values())))
                seen += size
                if progress is not None:
                    progress(size)
    finally:
        model.train(was_training)
    moments, owners, samples = collector.result()
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
