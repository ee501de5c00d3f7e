"""Statistics of a model over batches: the forward passes around the collector."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from orthomerge.errors import StatisticsError
from orthomerge.models.modules import evaluating, inputs_on
from orthomerge.moments import Representation
from orthomerge.statistics.collector import FeatureCollector
from orthomerge.statistics.distributed import failing_together, process_rank, reduce_to_first
from orthomerge.statistics.file import Statistics
from orthomerge.statistics.layers import backbone, target_layers, target_names
from orthomerge.statistics.meta import StatisticsMeta, describe_model


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
    form: str | None = None,
    prompt: str | None = None,
    max_length: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Statistics:
    """Second moments of the inputs of the target layers over unlabelled batches.

    The base runs as it is, in eval mode and without gradients; a PEFT model runs with its adapters
    switched off. Padding (`attention_mask` 0) is never counted. The result does not depend on
    batch size or padding side beyond the model's own rounding: padding on the left is moved to the
    right before the model runs, where no model takes it for words before the text.

    In a job of several processes (torch.distributed is initialised, as by `accelerate launch`)
    process p of P runs batches p, p + P, ...; one reduction at the end gives process 0 the
    statistics over all of them. The others get their own part.

    Args:
        model: any Transformers model, or a PEFT model on top of one.
        dataloader: batches of model inputs, with `attention_mask`; a `labels` entry is ignored.
            Every process is given all batches.
        target_modules: names as in PEFT's `target_modules`, or `["all-linear"]`.
        granularity: "token" (each real token a row), "sample" (each sequence's masked mean a row)
            or "task_mean" (one row, the mean over all real tokens).
        representation: how moments are held; by default chosen by width and memory.
        task: the name that errors give these features.
        model_id: what to remember the model by; its configuration's name without it.
        model_sha256: the hash of its weights, kept in the file.
        tokenizer_hash: the hash of its tokenizer, kept in the file.
        form: "text" where a language model reads the batches as it will in training, a prompt and
            an answer; "classifier" where they are texts as they are, the default without a prompt.
        prompt: the hash of the prompt that the batches put texts into (`Wording.batches`), where
            they do.
        max_length: the most tokens of a text in the batches, kept in the file.
        progress: called with the number of samples after each batch.

    Raises:
        UnknownNameError: a target matches no layer.
        StatisticsError: no samples, all padding, NaN features (with layer, task and row count), or
            a layer that does not run or runs twice; in all processes where one fails.
    """
    layers = target_layers(model, target_modules)
    collector = FeatureCollector(layers, granularity, representation)
    try:
        with failing_together(), _adapters_off(model), evaluating(model), torch.no_grad():
            samples = _run(model, dataloader, collector, progress)
            moments, owners = collector.result()
        moments, samples = reduce_to_first(moments, samples)
    except StatisticsError as problem:
        name = f"task '{task}', " if task else ""
        raise StatisticsError(f"{name}{problem}") from problem
    meta = StatisticsMeta(
        **describe_model(model, model_id),
        model_sha256=model_sha256,
        tokenizer_hash=tokenizer_hash,
        target_modules=sorted(target_names(model, target_modules)),
        granularity=granularity,
        samples=samples,
        form=form or ("classifier" if prompt is None else "text"),
        prompt=prompt,
        max_length=max_length,
    )
    return Statistics(moments=moments, layers=owners, meta=meta)


def _run(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]],
    collector: FeatureCollector,
    progress: Callable[[int], None] | None,
) -> int:
    """This process's share of the batches through the model; how many samples they hold."""
    device, runner = _input_device(model), backbone(model)
    rank, world = process_rank()
    samples = 0
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
    return samples


@contextmanager
def _adapters_off(model: nn.Module) -> Generator[None, None, None]:
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
    inputs = _padded_on_the_right(inputs_on(device, batch))
    shift = getattr(runner, "_shift_right", None)
    if shift is not None and "decoder_input_ids" not in inputs and "input_ids" in inputs:
        inputs["decoder_input_ids"] = shift(inputs["input_ids"])
        if "attention_mask" in inputs:  # start token in, last token out: as many as the text has
            inputs["decoder_attention_mask"] = inputs["attention_mask"]
    return inputs


def _padded_on_the_right(inputs: dict[str, Any]) -> dict[str, Any]:
    """Each text moved to the start of its row, where absolute positions and poolers expect it.

    `position_ids` move with it; a batch whose position_ids are not one per token stays as it is.
    """
    moved = dict(inputs)
    for side in ("", "decoder_"):
        mask = inputs.get(f"{side}attention_mask")
        if not isinstance(mask, Tensor) or mask.ndim != 2 or bool(mask[:, 0].all()):
            continue
        positions = inputs.get(f"{side}position_ids")
        if positions is not None and positions.shape != mask.shape:
            continue
        first = mask.bool().int().argmax(dim=1, keepdim=True)
        places = torch.arange(mask.shape[1], device=mask.device)
        order = (places + first) % mask.shape[1]
        rows = torch.arange(len(mask), device=mask.device)[:, None]
        for name, value in inputs.items():
            theirs = name.startswith("decoder_") == bool(side)
            if theirs and isinstance(value, Tensor) and value.shape[:2] == mask.shape:
                moved[name] = value[rows, order]
    return moved


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
