"""A model's outputs, loaded as its user loads it: run by its path, as a program of its own.

It imports nothing of orthomerge, so that what it finds is what Transformers and PEFT make of the
files alone. Everything is in float32, so that differences are not the arithmetic's.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
import transformers
from torch import Tensor

_files = cast(Any, safetensors.torch)  # it gives its functions no whole types
_BATCH = 16


def load(
    kind: str, folder: str, *, labels: int | None = None, head: Mapping[str, Tensor] | None = None
) -> tuple[Any, list[str]]:
    """The model of a class of Transformers, in float32, and the keys that its files do not fit.

    New weights, as a head's, are drawn under one seed; `head` takes their place.
    """
    torch.manual_seed(0)
    counted: dict[str, Any] = {} if labels is None else {"num_labels": labels}
    model, info = getattr(transformers, kind).from_pretrained(
        folder, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **counted
    )
    if head:
        odd = model.load_state_dict(dict(head), strict=False).unexpected_keys
        if odd:
            raise ValueError(f"the model has no '{odd[0]}' for its head")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.float().eval().to(device), sorted(info["unexpected_keys"])


def with_adapter(model: Any, folder: str) -> tuple[Any, dict[str, Any]]:
    """The model with an adapter, and which of its tensors PEFT takes from the file.

    The adapter is loaded a second time beside itself: only then does PEFT say what it took.
    """
    from peft import PeftModel

    found: Any = PeftModel.from_pretrained(model, folder)
    again = found.load_adapter(folder, "again")
    found.set_adapter("default")
    wanted = [key for key in found.state_dict() if ".again." in key]
    missing = sorted(set(wanted) & set(again.missing_keys))
    said = {"unexpected": sorted(again.unexpected_keys), "missing": missing, "wanted": len(wanted)}
    return found.eval(), said


@torch.inference_mode()
def outputs(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """`[texts, values]`: the logits, of the last token where every token has some; else its state.

    A model without a head gives the last hidden state, an encoder-decoder its first answer.
    """
    found: list[Tensor] = []
    place = next(model.parameters()).device
    for first in range(0, len(inputs["input_ids"]), _BATCH):
        batch = {k: v[first : first + _BATCH].to(place) for k, v in inputs.items()}
        if model.config.is_encoder_decoder:
            start = model.config.decoder_start_token_id or 0
            batch["decoder_input_ids"] = torch.full_like(batch["input_ids"][:, :1], start)
        given = model(**batch)
        if "start_logits" in given:
            values = torch.cat([given["start_logits"], given["end_logits"]], dim=1)
        else:
            values = given["logits"] if "logits" in given else given["last_hidden_state"]
        if values.ndim == 3 and values.shape[1] > 1:
            last = batch["attention_mask"].sum(dim=1) - 1
            values = values[torch.arange(len(last)), last]
        found.append(values.flatten(1).float().cpu())
    return torch.cat(found)


def _run(how: Mapping[str, Any], inputs: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
    head = _files.load_file(how["head"]) if how["head"] else None
    model, odd = load(how["kind"], how["model"], labels=how["labels"], head=head)
    said: dict[str, Any] = {"unexpected": odd, "missing": [], "wanted": 1}
    if how["adapter"]:
        model, said = with_adapter(model, how["adapter"])
    return outputs(model, inputs), said


def main(job: Path) -> None:
    """Carry out what `job.json` in a folder says; outputs and what was found lie beside it."""
    runs: dict[str, Any] = json.loads((job / "job.json").read_text(encoding="utf-8"))
    inputs = _files.load_file(job / "inputs.safetensors")
    found: dict[str, Tensor] = {}
    said: dict[str, Any] = {}
    for name, how in runs.items():
        try:
            found[name], said[name] = _run(how, inputs)
        except Exception as problem:  # whatever a file makes of itself is what is to be said
            said[name] = {"error": f"{type(problem).__name__}: {problem}"}
    _files.save_file(
        {name: tensor.contiguous() for name, tensor in found.items()}, job / "out.safetensors"
    )
    (job / "said.json").write_text(json.dumps(said), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
