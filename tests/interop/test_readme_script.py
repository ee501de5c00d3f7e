"""The PEFT script in the README, run as it stands."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import peft
import transformers
from conftest import make_texts
from tiny_lora import TARGETS, lay_out, loudest, rows_of_A

import orthomerge
from orthomerge.models.loading import load_language_model, load_tokenizer
from orthomerge.statistics import batches

README = Path(__file__).resolve().parents[2] / "README.md"


def test_three_lines_in_a_peft_script_start_and_hold_an_adapter(tmp_path, monkeypatch):
    blocks = re.findall(r"^```python\n(.*?)^```$", README.read_text("utf-8"), re.S | re.M)
    (script,) = [b for b in blocks if "prepare(model," in b]
    added = [line for line in script.splitlines() if re.search(r"# \d$", line)]
    assert len(added) == 3
    plain = "\n".join(line for line in script.splitlines() if line not in added)
    assert "orthomerge" not in plain
    assert "osrm" not in plain.lower()  # a PEFT script without them

    monkeypatch.chdir(tmp_path)
    base, others = lay_out(tmp_path)
    model, tokenizer = load_language_model(str(base)), load_tokenizer(str(base))
    texts = make_texts(12)
    own = orthomerge.collect_statistics(
        model, batches([(t, None) for t in texts], tokenizer), TARGETS, form="text"
    )
    own.save("mine.stats.safetensors")
    shutil.copy(others[0], "b.stats.safetensors")
    ids = [tokenizer(t)["input_ids"] for t in texts]
    names = {
        "base": model,
        "rows": [{"input_ids": i, "labels": i} for i in ids],
        "arguments": transformers.TrainingArguments(
            "run", max_steps=4, per_device_train_batch_size=1, learning_rate=2e-2, use_cpu=True,
            report_to="none", save_strategy="no", disable_tqdm=True,
        ),
        "Trainer": transformers.Trainer,
        **{n: getattr(peft, n) for n in ("LoraConfig", "get_peft_model")},
    }  # fmt: skip
    exec(script, names)
    loud = loudest(["b.stats.safetensors"])
    trained = names["model"]
    for layer, A in rows_of_A(trained).items():
        assert float(A.norm()) > 0.1
        assert float((A.double() @ loud[layer]).norm()) < 1e-6
    learnt = [p.detach().norm() for n, p in trained.named_parameters() if "lora_B" in n]
    assert len(learnt) == 4
    assert all(float(norm) > 1e-3 for norm in learnt)
