"""`orthomerge extract`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from orthomerge.cli._app import app, out, print_json
from orthomerge.cli._options import (
    Energy,
    Json,
    MaxError,
    Output,
    Overwrite,
    kept_energy,
    parse_rank,
)
from orthomerge.cli._progress import Quiet, work_bar
from orthomerge.cli.resize import show_ranks, span
from orthomerge.errors import AdapterError


@app.command()
def extract(
    base: str,
    finetuned: str,
    output: Output,
    rank: Annotated[str, typer.Option()] = "auto",
    energy: Energy = None,
    max_error: MaxError = None,
    modules_to_save: Annotated[bool, typer.Option("--modules-to-save")] = False,
    leave_out: Annotated[bool, typer.Option("--leave-out")] = False,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make a LoRA adapter of a fully fine-tuned model, so that it can be merged with adapters.

    Example: [bold]orthomerge extract org/base finetuned/ --rank auto --output adapter/[/]

    Args:
        base: The base model: a folder or an id.
        finetuned: The model that was trained from it.
        output: The folder to write.
        rank: A number, or 'auto': in every layer the least that keeps --energy.
        modules_to_save: Keep what no LoRA layer holds (norms, embeddings, biases, added tokens)
            whole where it changed. Without this such a change is an error.
        leave_out: Leave it out, and say so: the adapter is then not the fine-tuned model.
    """
    from orthomerge.adapters import extract_adapter

    if modules_to_save and leave_out:
        raise AdapterError("--modules-to-save and --leave-out say two things: give one of them.")
    with work_bar("layers") as progress:
        found = extract_adapter(
            base, finetuned, output, rank=parse_rank(rank) or rank,
            energy=kept_energy(energy, max_error),
            others="save" if modules_to_save else "leave out" if leave_out else "refuse",
            overwrite=overwrite, progress=progress,
        )  # fmt: skip
    if json:
        print_json({**asdict(found), "path": str(output)})
        return
    show_ranks(found.ranks, found.truncation_error, "extract.json")
    whole = f"; {len(found.whole)} tensors are whole, as '{found.whole[0]}'" if found.whole else ""
    out.print(
        f"{output}: {len(found.ranks)} layers, {span(found.ranks)}, with {found.energy:.2%} of the "
        f"change's energy; the model differs from its base by {found.change:.2%}{whole}.",
        soft_wrap=True,
    )
