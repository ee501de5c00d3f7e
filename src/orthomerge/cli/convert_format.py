"""`orthomerge convert-format`."""

from __future__ import annotations

from typing import Annotated

import typer

from orthomerge.cli._app import app, out, print_json
from orthomerge.cli._options import Json, Output, Overwrite


@app.command("convert-format")
def convert_format(
    adapter: str,
    output: Output,
    to: Annotated[str, typer.Option()],
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write an adapter of Stable Diffusion, SDXL or Flux in another program's form.

    Example: [bold]orthomerge convert-format a.safetensors --to peft --output b.safetensors[/]

    Args:
        adapter: A file of kohya's or diffusers', or a PEFT folder.
        output: A file that ends in .safetensors; with --to peft also a folder, with a PEFT folder
            per model.
        to: 'kohya' (also for ComfyUI and AUTOMATIC1111), 'diffusers', or 'peft' (lora_A and lora_B,
            which diffusers reads, too).
    """
    from orthomerge.adapters import convert_format as convert

    found = convert(adapter, output, to, overwrite=overwrite)
    count = len(found.shapes)
    if json:
        print_json({"path": str(output), "form": to, "layers": count})
        return
    out.print(f"{output}: {count} layers in the form of {to}.", soft_wrap=True)
