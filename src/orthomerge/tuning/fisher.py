"""An adapter's Fisher information on its own task, ready for the merging method `fisher`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from orthomerge.adapters import (
    Adapter,
    align_adapters,
    base_of,
    read_adapter,
    require_form,
    require_runnable,
)
from orthomerge.evaluation.classification import applied
from orthomerge.fisher import FisherMeta, collect_fisher
from orthomerge.io.files import fingerprint
from orthomerge.models.assets import ResolvedModel
from orthomerge.models.loading import load_language_model, preferred_device
from orthomerge.prompting import Asked, Wording, generate, log_likelihoods
from orthomerge.statistics import batches
from orthomerge.tasks import Prompt, Task, get_task
from orthomerge.tuning.inputs import load_with_head, tokenizer_of


def adapter_fisher(
    adapter: str | Path | Adapter,
    task: str,
    *,
    base: str | None = None,
    samples: int = 100,
    seed: int = 0,
    batch_size: int = 16,
    max_length: int = 48,
    prompt: Prompt | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[dict[str, Tensor], FisherMeta]:
    """Fisher information of every layer of an adapter, on training rows of its task.

    The model is base, adapter and the adapter's head; the rows' labels are not looked at.
    Equation, cost and units: `orthomerge.fisher.collect_fisher`.

    Args:
        adapter: a PEFT folder, or an adapter read before.
        task: its task, by name or file.
        base: the base model; by default the one the adapter names.
        samples: training rows, drawn under `seed`.
        prompt: how the task is asked, where the adapter answers it in words.
        progress: called with the number of samples after each batch.

    Raises:
        AdapterError: the adapter cannot be read, does not fit the base, carries no head, or is of
            the other form (`require_form`).
        UnknownNameError, TaskError, AssetError: no such task, rows or base model.
        StatisticsError: information that is not finite.

    Source: Matena and Raffel 2022, arXiv 2111.09832.
    """
    read = adapter if isinstance(adapter, Adapter) else read_adapter(adapter, base=base)
    (read,) = align_adapters([read], base=base)
    require_runnable(read)
    require_form(read, "classifier" if prompt is None else "text")
    about = get_task(task)
    rows = about.data(train=samples, seed=seed).train
    found = base_of(read, base)
    return fisher_on_texts(
        read,
        about,
        [(row.text, row.pair) for row in rows],
        found,
        tokenizer_of(found),
        batch_size=batch_size,
        max_length=max_length,
        prompt=prompt,
        progress=progress,
    )


def fisher_on_texts(
    adapter: Adapter,
    task: Task,
    texts: Sequence[tuple[str, str | None]],
    base: ResolvedModel,
    tokenizer: Any,
    *,
    batch_size: int = 16,
    max_length: int = 48,
    prompt: Prompt | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[dict[str, Tensor], FisherMeta]:
    """`adapter_fisher` on a sample and a base that are at hand; it raises the same."""
    if prompt is None:
        model = load_with_head(
            base, tokenizer, adapter.modules, task.outputs, regression=task.regression
        )
    else:
        model = load_language_model(base.path_or_id, name=base.name).requires_grad_(False)
    with applied(model.to(preferred_device()), adapter.layers):
        if prompt is None:
            fisher = collect_fisher(
                model,
                batches(texts, tokenizer, batch_size=batch_size, max_length=max_length),
                list(adapter.layers),
                regression=task.regression,
                progress=progress,
            )
        else:
            wording = Wording.of(prompt, tokenizer, model.config, max_length)
            fisher = text_fisher(
                model, wording, texts, list(adapter.layers),
                batch_size=batch_size, progress=progress,
            )  # fmt: skip
    meta = FisherMeta(
        model_id=base.name,
        model_sha256=base.sha256,
        adapter_sha256=adapter.sha256 or "",
        task=task.name,
        samples=len(texts),
        data=fingerprint(list(texts) if prompt is None else [list(texts), prompt.fingerprint]),
        form="classifier" if prompt is None else "text",
        prompt=None if prompt is None else prompt.fingerprint,
    )
    return fisher, meta


def text_fisher(
    model: Any,
    wording: Wording,
    texts: Sequence[tuple[str, str | None]],
    layers: Sequence[str],
    *,
    batch_size: int = 16,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """Fisher information of a language model on a task in words, `[d_out, d_in]` a layer.

    `F = E_x Σ_y p(y|x) (∂ log p(y|x) / ∂W)²`, `p(y|x) = softmax_y log p(answer_y | prompt)`: the
    answers' likelihoods made to sum to one, and the expectation over them exact. A number has no
    list of answers: one is drawn from the model for each text under `seed`, and the information is
    of its whole log-likelihood.

    Raises:
        AdapterError, StatisticsError: as `orthomerge.fisher.collect_fisher`.
        TaskError: the prompt is too long.
    """
    answers = wording.prompt.answers
    asked = sorted((wording.encode(t, answers) for t in texts), key=lambda item: len(item.prompt))
    chunks = [asked[at : at + batch_size] for at in range(0, len(asked), batch_size)]
    if not answers:
        chunks = [_drawn(model, wording, chunk, seed + at) for at, chunk in enumerate(chunks)]
    return collect_fisher(
        model,
        (wording.likelihood_batch(chunk, share=False) for chunk in chunks),
        layers,
        regression=not answers,
        outputs=log_likelihoods,
        progress=progress,
    )


def _drawn(model: Any, wording: Wording, chunk: Sequence[Asked], seed: int) -> list[Asked]:
    """The prompts with an answer of the model's own each; an empty answer is the end alone."""
    found = generate(model, wording, [item.prompt for item in chunk], seed=seed)
    end = [wording.tokenizer.eos_token_id]
    return [Asked(item.prompt, [said or end]) for item, said in zip(chunk, found, strict=True)]
