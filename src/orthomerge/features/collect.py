"""Streaming the inputs of chosen layers into second moments, and leaving no trace in the model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from orthomerge.errors import StatisticsError, UnknownNameError, nearest, unknown_name
from orthomerge.features.distributed import failing_together, process_rank, reduce_to_first
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


class _AllRead(BaseException):
    """Ends a forward pass whose rest is of no use; no error, so nothing on the way may catch it."""


class _Input:
    """One distinct layer input: the layers that read it, and the moment it feeds."""

    def __init__(self, lead: str, features: Tensor) -> None:
        self.lead = lead
        self.layers = [lead]
        self.width = features.shape[-1]
        self.source = 0
        self.moment: Moment | None = None
        # Held while layers of one forward pass may still read it, to see that it is the same one.
        self.current: tuple[Tensor, tuple] | None = None
        self.waiting = 0


def _identity(features: Tensor) -> tuple:
    """What tells one live tensor from another, whatever views were made of it on the way.

    The version counts writes in place: a residual stream added onto is not what it was before.
    """
    version = 0 if features.is_inference() else features._version
    return features.device, features.data_ptr(), features.shape, features.stride(), version


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
        self._real: dict[tuple[int, torch.device], Tensor] = {}
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
        held: dict[str, tuple[Tensor, tuple]] = {}

        def keep(name: str, features: Tensor) -> None:
            held[name] = features.detach(), _identity(features)

        with self._hooks(keep):
            yield
        shapes = [m.shape for m in masks if m is not None]
        known: dict[tuple, _Input] = {}
        for name, (features, key) in held.items():
            if key in known:
                known[key].layers.append(name)
            else:
                known[key] = _Input(name, features)
                fits = [i for i, shape in enumerate(shapes) if _fits(features, shape)]
                known[key].source = fits[0] if fits else 0
            self._inputs[name] = known[key]
        outputs = {
            i.lead: (i.width, sum(_outputs(self._layers[n]) for n in i.layers))
            for i in known.values()
        }
        self._kinds = choose(outputs, self._representation)

    @contextmanager
    def watch(
        self, masks: Sequence[Tensor | None], draw: int = 0, *, stop: bool = False
    ) -> Iterator[None]:
        """Hooks on for one forward pass; `masks` mark real positions, 1 or True, padding 0.

        `draw` is the number of the batch, by which a representation that samples draws. With `stop`
        the pass, and with it the block, ends when the last layer has been read: what the model
        would still compute serves nobody. Hooks are gone and held activations dropped when the
        block ends, however it ends.

        Raises:
            StatisticsError: a layer that does not run, or runs twice; rows with NaN or infinity;
                an input that no mask fits.
        """
        self._masks = [m.bool() for m in masks if m is not None]
        self._draw = draw
        try:
            with self._hooks(self._keep, stop=stop), suppress(_AllRead):
                yield
        finally:
            self._masks, self._real = [], {}
            for item in self._inputs.values():
                item.current = None

    @contextmanager
    def _hooks(self, keep: Callable[[str, Tensor], None], stop: bool = False) -> Iterator[None]:
        ran: set[str] = set()

        def hook(name: str) -> Callable[..., None]:
            def read(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if name in ran:
                    raise StatisticsError(
                        f"layer '{name}' ran twice in one forward pass: weights shared between "
                        "depths are not supported; leave it out of the targets."
                    )
                ran.add(name)
                keep(name, args[0] if args else next(iter(kwargs.values())))
                if stop and len(ran) == len(self._layers):
                    raise _AllRead

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
        missing = [n for n in self._layers if n not in ran]
        if missing:
            raise StatisticsError(
                f"layer '{missing[0]}' did not run on this data: leave it out of the targets."
            )

    def _keep(self, name: str, features: Tensor) -> None:
        item = self._inputs[name]
        if name == item.lead:
            self._take(item, features)
            item.waiting = len(item.layers) - 1
            item.current = (features, _identity(features)) if item.waiting else None
            return
        if item.current is None or item.current[1] != _identity(features):
            raise StatisticsError(
                f"layers '{item.lead}' and '{name}' read one tensor in the first batch and "
                "different ones now: name them in separate runs."
            )
        item.waiting -= 1
        if not item.waiting:
            item.current = None

    def _mask_for(self, item: _Input, features: Tensor) -> Tensor | None:
        """The mask of an input's positions; None where it has none: a pooled row a sample."""
        if not self._masks:
            return None
        mask = self._masks[min(item.source, len(self._masks) - 1)]
        fitting = [m for m in (mask, *self._masks) if _fits(features, m.shape)]
        if fitting:
            return fitting[0]
        if features.ndim == 2 and features.shape[0] == mask.shape[0]:
            return None
        raise StatisticsError(
            f"layer '{item.lead}' reads {list(features.shape)}, which no attention mask fits "
            f"({[list(m.shape) for m in self._masks]}): padding could not be told apart; leave it "
            "out of the targets."
        )

    def _take(self, item: _Input, features: Float[Tensor, "batch *length d_in"]) -> None:
        mask = self._mask_for(item, features)
        if mask is not None and features.ndim == 2:
            features = features.view(*mask.shape, item.width)
        if self.granularity == "sample" and features.ndim >= 3:
            wide = features.double()
            if mask is None:
                rows = wide.flatten(1, -2).mean(dim=1)
            else:
                mask = mask.to(wide.device)
                weights = mask.to(wide)
                real = weights.sum(dim=1)
                rows = torch.where(mask[..., None], wide, 0.0).sum(dim=1) / real[:, None]
                rows = rows[real > 0]
        else:
            rows = features.reshape(-1, item.width)
            if mask is not None:
                rows = self._real_rows(rows, mask)
        if item.moment is None:
            item.moment = self._new(item)
        try:
            item.moment.update(rows, self._draw)
        except StatisticsError as problem:
            raise StatisticsError(f"layer '{item.lead}': {problem}") from problem

    def _real_rows(self, rows: Tensor, mask: Tensor) -> Tensor:
        """The rows at real positions, which are looked up once a pass and mask; all, uncopied."""
        key = (id(mask), rows.device)  # the masks live as long as the pass
        if key not in self._real:
            self._real[key] = mask.reshape(-1).nonzero()[:, 0].to(rows.device)
        real = self._real[key]
        return rows if len(real) == len(rows) else rows.index_select(0, real)

    def _new(self, item: _Input) -> Moment:
        if self.granularity == "task_mean":
            return MeanMoment(item.width)
        return self._representation.new(self._kinds[item.lead], item.width)

    def result(self) -> tuple[dict[str, Moment], dict[str, str]]:
        """The moments by lead layer, and every layer's lead.

        Raises:
            StatisticsError: nothing was discovered.
        """
        if not self._inputs:
            raise StatisticsError("no sample was seen: the data is empty.")
        moments = {
            i.lead: i.moment if i.moment is not None else self._new(i)
            for i in self._inputs.values()
        }
        return moments, {layer: item.lead for layer, item in self._inputs.items()}


def _fits(features: Tensor, mask: torch.Size) -> bool:
    """Whether features lie on the positions of a mask, in its shape or flattened to rows."""
    flat = features.ndim == 2 and features.shape[0] == mask.numel() != mask[0]
    return features.shape[:-1] == mask or flat


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
        StatisticsError: no samples, all padding, NaN features (with layer, task and row count), or
            a layer that does not run or runs twice; in all processes where one fails.
    """
    layers = target_layers(model, target_modules)
    collector = FeatureCollector(layers, granularity, representation)
    device = _input_device(model)
    runner = trunk(model)
    # Part by part: a frozen part may rest in eval mode inside a model that trains.
    training = [(module, module.training) for module in model.modules()]
    rank, world = process_rank()
    samples = 0
    model.eval()
    try:
        with failing_together(), _adapters_off(model), torch.no_grad():
            # Hooks that place weights tidy up after a module; a pass that ends early skips that.
            stop = not any(hasattr(module, "_hf_hook") for module in runner.modules())
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
                with collector.watch(_masks_of(inputs), draw=number, stop=stop):
                    runner(**inputs)
                size = len(next(iter(inputs.values())))
                samples += size
                if progress is not None:
                    progress(size)
            moments, owners = collector.result()
        moments, samples = reduce_to_first(moments, samples)
    except StatisticsError as problem:
        name = f"task '{task}', " if task else ""
        raise StatisticsError(f"{name}{problem}") from problem
    finally:
        for module, mode in training:
            module.training = mode
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


def _input_device(model: nn.Module) -> torch.device:
    """Where inputs go: for a base spread over devices, where its first weights run."""
    spread = getattr(model, "hf_device_map", None)
    if not spread:
        return next(model.parameters()).device
    for module in model.modules():
        # Offloaded weights lie on no device; the hook of their module knows where they run.
        runs_on = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        weight = next(module.parameters(recurse=False), None)
        if weight is not None and (runs_on is not None or weight.device.type != "meta"):
            return torch.device(weight.device if runs_on is None else runs_on)
    return torch.device("cpu")


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
        if "attention_mask" in inputs:  # start token in, last token out: as many as the text has
            inputs["decoder_attention_mask"] = inputs["attention_mask"]
    return inputs


def _masks_of(inputs: Mapping[str, Any]) -> list[Tensor | None]:
    return [inputs.get("attention_mask"), inputs.get("decoder_attention_mask")]


def _one_sample(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], list[Tensor | None]]:
    """The first sample alone, its decoder part of another length than its encoder part."""
    size = len(next(iter(inputs.values())))
    small = {
        k: v[:1] if isinstance(v, Tensor) and v.ndim and len(v) == size else v
        for k, v in inputs.items()
    }
    if "decoder_input_ids" in small and "input_ids" in small:
        length = small["input_ids"].shape[1]
        if small["decoder_input_ids"].shape[1] == length:
            for name in ("decoder_input_ids", "decoder_attention_mask"):
                if name in small:  # a single position cannot be made shorter, so it is doubled
                    short = small[name][:, :-1]
                    small[name] = short if length > 1 else small[name].repeat(1, 2)
    return small, _masks_of(small)
