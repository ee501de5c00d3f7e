"""Fine-tune an adapter that will merge with others', by TRL's SFTTrainer.

Your texts and the other teams' statistics in, a PEFT adapter out:

    pip install orthomerge trl
    python examples/trl_sft.py MODEL --data mine.jsonl --others b.stats.safetensors --output mine/
    orthomerge merge mine/ theirs/ --output merged/

`mine.jsonl` holds what SFTTrainer reads: lines with a "text", or a "prompt" and a "completion".
Statistics are of the form "text": a language model's inputs in training. The others' are made by
`orthomerge stats --form text` or by this script, which leaves yours in mine/mine.stats.safetensors.
Copy it and change what you like: lines with an arrow are all that orthomerge adds to TRL.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import orthomerge
from orthomerge.statistics import batches

TARGETS = ["q_proj", "v_proj"]
# Where A starts, by what training then obeys.
SOLVERS = {
    "penalty": "default", "project": "contrastive", "freeze": "contrastive", "init": "min_eigen",
}  # fmt: skip


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="An adapter that merges, trained by SFTTrainer.")
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--others", nargs="+", required=True, help="statistics of other tasks")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--constraint", choices=list(SOLVERS), default="project")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--samples", type=int, default=100, help="rows for the own statistics")
    parser.add_argument("--steps", type=int, default=-1, help="end after so many steps")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    return parser.parse_args()


def read(row: dict) -> str:
    """A row as the model reads it."""
    return row["text"] if "text" in row else row["prompt"] + row["completion"]


def main() -> None:
    """Statistics, start, training, adapter."""
    asked = parse()
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    base = AutoModelForCausalLM.from_pretrained(asked.model)
    rows = load_dataset("json", data_files=asked.data, split="train")

    drawn = rows.shuffle(seed=0).select(range(min(asked.samples, len(rows))))
    texts = [(read(row), None) for row in drawn]
    read_as = batches(texts, tokenizer)
    own = orthomerge.collect_statistics(base, read_as, TARGETS, form="text")  # <--

    lora = LoraConfig(
        r=asked.rank, lora_alpha=2 * asked.rank, target_modules=TARGETS, task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, lora)
    config = orthomerge.OsrmConfig(SOLVERS[asked.constraint], constraint=asked.constraint)  # <--
    osrm = orthomerge.prepare(model, asked.others, own, config)  # <--

    trainer = SFTTrainer(
        model=model,  # wrapped already, so there is no peft_config here
        processing_class=tokenizer,
        train_dataset=rows,
        callbacks=[osrm],  # <--
        args=SFTConfig(
            output_dir=str(asked.output / "checkpoints"),
            learning_rate=asked.learning_rate,
            max_steps=asked.steps,
            save_strategy="no",
            bf16=torch.cuda.is_available(),
            report_to="none",
        ),
    )
    trainer.train()
    trainer.save_model(str(asked.output))
    osrm.record(asked.output)  # <-- says how it was trained
    own.save(asked.output / "mine.stats.safetensors")  # <--


if __name__ == "__main__":
    main()
