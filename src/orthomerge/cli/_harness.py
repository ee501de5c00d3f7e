"""`orthomerge eval --harness`: an adapter on its base, scored by lm-evaluation-harness."""

from __future__ import annotations

from contextlib import nullcontext, redirect_stderr
from io import StringIO
from pathlib import Path

from orthomerge.cli._app import out, print_json, split_names


def by_harness(
    adapter: Path,
    tasks: str,
    base: str | None,
    rows: int | None,
    few_shot: int | None,
    output: Path | None,
    seed: int,
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    """Run the harness, print its scores and keep its result where `output` says."""
    from orthomerge.adapters import align_adapters, base_of, read_adapter, require_runnable
    from orthomerge.evaluation.harness import (
        is_result,
        require_harness,
        run_harness,
        scores,
        write_result,
    )
    from orthomerge.io.outputs import require_free_file
    from orthomerge.models.loading import load_language_model, load_tokenizer

    require_harness()
    (read,) = align_adapters([read_adapter(adapter, base=base)], base=base)
    require_runnable(read)
    if output is not None:
        require_free_file(output, is_result, inputs=[adapter], base=base or read.base_model)
    found = base_of(read, base)
    model, tokenizer = load_language_model(found.path_or_id), load_tokenizer(found.path_or_id)
    with redirect_stderr(StringIO()) if quiet else nullcontext():  # its bars are its own
        result = run_harness(
            model, tokenizer, split_names(tasks), read.layers, limit=rows, few_shot=few_shot,
            seed=seed,
        )  # fmt: skip
    if output is not None:
        about = {"adapter": str(adapter), "adapter_sha256": read.sha256, "base": found.name,
                 "seed": seed, "limit": rows}  # fmt: skip
        write_result(output, result, about)
    if as_json:
        print_json(scores(result))
        return
    for task, values in scores(result).items():
        said = "   ".join(f"{name} {value:.4f}" for name, value in values.items())
        out.print(f"{task:>24}  {said}", highlight=False, markup=False, soft_wrap=True)
