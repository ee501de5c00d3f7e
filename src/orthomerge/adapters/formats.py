"""An adapter of a diffusion model written in another program's form."""

from __future__ import annotations

from pathlib import Path

from orthomerge.adapters.align import renamed_in_form
from orthomerge.adapters.diffusion import FORMS, common_header, evenly_scaled
from orthomerge.adapters.files import Adapter, read_adapter
from orthomerge.adapters.output import is_file_output, require_free_for_file, write_with_record
from orthomerge.adapters.write import AdapterWriter, Frame
from orthomerge.errors import AdapterError, unknown_name
from orthomerge.io.files import atomic_path
from orthomerge.io.outputs import require_free


def convert_format(
    adapter: str | Path | Adapter, output: str | Path, to: str, *, overwrite: bool = False
) -> Adapter:
    """Use where a program wants an adapter of Stable Diffusion, SDXL or Flux in another form.

    The update of every layer stays what it is, up to the rounding of its type: names are changed,
    the scaling goes into the factors, and projections that Flux's authors keep in one layer are
    split for diffusers, or put together.

    Args:
        adapter: a file of kohya's or diffusers', or a PEFT folder of one of the models.
        output: a file that ends in .safetensors; with `to="peft"` also a folder, in which each of
            the adapter's models (`unet/`, `text_encoder/`) has a PEFT folder of its own.
        to: "kohya", "diffusers" or "peft", whose keys diffusers reads, too.
        overwrite: replace a file that orthomerge wrote.

    Raises:
        UnknownNameError: no such form.
        AdapterError: an adapter that cannot be read, or with a layer that the form has no name for.
        OutputError: an output that is not free.
    """
    if to not in FORMS:
        raise unknown_name("form", to, FORMS, where="--to", error=AdapterError)
    single = is_file_output(output)
    if single:
        require_free_for_file(output, inputs=[adapter], overwrite=overwrite)
    else:
        require_free(output, inputs=[adapter])
    read = adapter if isinstance(adapter, Adapter) else read_adapter(adapter)
    if read.modules or read.biases or read.embeddings:
        raise AdapterError(
            f"'{read.called}' has more than two factors per layer (whole modules, biases or "
            "embeddings), for which the files of diffusion models have no place."
        )
    found = renamed_in_form(read, to)
    with atomic_path(output) as place:
        if single:
            folder = place.with_suffix("")
            _write(folder, found, list(found.shapes), to)
            record = {"converted": read.called, "sha256": read.sha256, "to": to}
            write_with_record(folder, place, record)
        elif to != "peft":
            raise AdapterError(
                f"the form '{to}' is one file: name an output that ends in .safetensors."
            )
        else:
            for component in dict.fromkeys(name.partition(".")[0] for name in found.shapes):
                names = [n for n in found.shapes if n.startswith(f"{component}.")]
                _write(place / component, found, names, None)
    return found


def _write(folder: Path, adapter: Adapter, names: list[str], form: str | None) -> None:
    """Some of the layers as a file of `form`, or as a PEFT folder, which names no component."""
    called = {name: name if form else name.partition(".")[2] for name in names}
    kernels = {called[n]: kernel for n, kernel in adapter.kernels.items() if n in called}
    frame = Frame(None, kernels=kernels, form=form, header=common_header([adapter.header]))
    with AdapterWriter(folder, list(called.values()), frame) as writer:
        for name, own in called.items():
            writer.add(own, evenly_scaled(adapter.layers[name]))
