"""What the penalty costs a training step, at the width of an 8B model.

python -m benchmarks.penalty          # two minutes on two cores
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.timing import machine, paired_ratio, save
from orthomerge.adapters import Penalty, lora_layers, new_lora
from orthomerge.adapters.penalty import Charge, Charges
from orthomerge.moments import Moment, RowMoment, SecondMoment

D, RANK, TARGETS, OTHERS, SAMPLES = 4096, 8, ["q_proj", "v_proj"], 7, 100
BATCH, TOKENS = 4, 128
WANTED = 1.03


def layer_of_8b() -> nn.Module:
    """One decoder layer of Llama-3-8B's shape, with few words."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = LlamaConfig(
        vocab_size=256, hidden_size=D, intermediate_size=14336, num_hidden_layers=1,
        num_attention_heads=32, num_key_value_heads=8,
    )  # fmt: skip
    return LlamaForCausalLM(sizes)


def moment(form: str) -> Moment:
    """What the others' statistics come to: the mean of seven tasks' rows, or a full matrix."""
    if form == "rows":
        rows = torch.randn(OTHERS * SAMPLES, D, dtype=torch.float64)
        return RowMoment.from_factor(rows, len(rows))
    rows = torch.randn(2 * D, D)
    return SecondMoment.from_sums((rows.T @ rows).double(), len(rows))


def steps(model: Any, form: str) -> tuple[Callable[[], None], Callable[[], None]]:
    """A step of training with the penalty, and one without."""
    held = moment(form)
    charges = Charges({name: Charge(held, 0.0, 1.0) for name in lora_layers(model)}, 10.0)
    penalty = Penalty(model, charges)
    words = torch.randint(0, 256, (BATCH, TOKENS))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def plain() -> None:
        model(input_ids=words, labels=words).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def charged() -> None:
        model(input_ids=words, labels=words).loss.backward()
        penalty.add_gradients()
        optimizer.step()
        optimizer.zero_grad()

    return charged, plain


def main() -> None:
    """Ratios of one run, the two steps taken in turns."""
    torch.manual_seed(0)
    model = new_lora(
        layer_of_8b(), targets=TARGETS, rank=RANK, alpha=2 * RANK, task_type="CAUSAL_LM", seed=0
    )
    rows = []
    for form in ("rows", "full"):
        ours, theirs, ratio = paired_ratio(*steps(model, form))
        rows.append(
            {"moment": form, "with_s": ours, "without_s": theirs, "ratio": ratio, "wanted": WANTED}
        )
    save(
        "penalty", rows, machine=machine(), d=D, rank=RANK, others=OTHERS, samples=SAMPLES,
        tokens=BATCH * TOKENS,
    )  # fmt: skip


if __name__ == "__main__":
    main()
