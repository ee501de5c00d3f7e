"""The PEFT script in the README, run as it stands."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import peft
import torch
import transformers
from conftest import make_texts
from tiny_lora import lay_out

import orthomerge
from orthomerge.adapters import lora_layers
from orthomerge.models.loading import load_language_model, load_tokenizer

README = Path(__file__).resolve().parents[2] / "README.md"


def test_three_lines_keep_an_adapter_out_of_the_others_outputs(tmp_path, monkeypatch):
    blocks = re.findall(r"^```python\n(.*?)^```$", README.read_text("utf-8"), re.S | re.M)
    (script,) = [b for b in blocks if "prepare(model," in b]
    added = [line for line in script.splitlines() if re.search(r"# \d$", line)]
    assert len(added) == 3
    plain = "\n".join(line for line in script.splitlines() if line not in added)
    assert "orthomerge" not in plain
    assert "osrm" not in plain.lower()  # a PEFT script without them

    monkeypatch.chdir(tmp_path)
    base, others = lay_out(tmp_path)
    tokenizer = load_tokenizer(str(base))
    texts = make_texts(12)
    shutil.copy(others[0], "b.stats.safetensors")
    shutil.copy(others[1], "c.stats.safetensors")
    ids = [tokenizer(t)["input_ids"] for t in texts]
    names = {
                "rows": [{"input_ids": i, "labels": i} for i in ids],
        "arguments": transformers.TrainingArguments(
            "run", max_steps=30, per_device_train_batch_size=1, learning_rate=2e-2, use_cpu=True,
            report_to="none", save_strategy="no", disable_tqdm=True,
        ),
        "Trainer": transformers.Trainer,
        **{n: getattr(peft, n) for n in ("LoraConfig", "get_peft_model")},
    }  # fmt: skip

    def energy(lines: str) -> float:
        """What the trained update adds to the others' outputs: `Σ tr(B A S Aᵀ Bᵀ)` over layers."""
        torch.manual_seed(0)
        given = {**names, "base": load_language_model(str(base))}
        exec(lines, given)
        read = [orthomerge.Statistics.load(f) for f in others]
        found = 0.0
        for name, layer in lora_layers(given["model"]).items():
            A, B = (getattr(layer, f"lora_{m}")["default"].weight.detach().double() for m in "AB")
            assert float(B.norm()) > 1e-3
            moment = sum(item.second_moment(name).double() for item in read)
            found += float(torch.trace(B @ A @ moment @ A.T @ B.T))
        return found

    assert energy(script) < 0.5 * energy(plain)
