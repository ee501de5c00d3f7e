"""What a statistics file gives away, by attacking it: membership of texts, and their words.

python -m benchmarks.privacy          # some five minutes of one core

MiniLM's query inputs over movie reviews (the training pool of the task `sentiment`). The reader has
the model, the file, and 800 other reviews; it never sees the members. Which attack it uses is
chosen on files that it makes of texts of its own, so no attack is picked on what is reported.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from scipy.stats import rankdata

from benchmarks.privacy_attacks import (
    Dictionary,
    Reference,
    member_scores,
    reference,
    verbatim,
    words,
)
from benchmarks.privacy_features import Form, Texts, checked, encode, moments_of
from benchmarks.timing import save
from orthomerge.models.assets import resolve_model
from orthomerge.models.loading import load_backbone, load_tokenizer
from orthomerge.tasks import get_task

SIZES = (100, 1000, 10, 1)
FILES = {1: 6, 10: 4, 100: 2, 1000: 2}
CANDIDATES = 40
REFERENCE, SHADOW, FRESH, MEMBERS = 800, 1040, 200, 1100

PARTS = [(64, 0.0), (64, 1.0), (16, 0.0), (16, 1.0)]
FORMS = [
    *(Form("token", kind) for kind in ("full", "sketch")),
    *(Form("token", "full", k, noise) for k, noise in PARTS),
    Form("sample", "full"),
    *(Form("sample", "full", k, noise) for k, noise in PARTS),
    Form("task_mean"),
]
WORD_FORMS = [
    Form("token", "full"),
    *(Form("token", "full", k, noise) for k, noise in PARTS if (k, noise) != (16, 0.0)),
]


def auc(members: np.ndarray, fresh: np.ndarray) -> float:
    """The chance that a member scores above a fresh text; ties count half."""
    ranks = rankdata(np.concatenate([members, fresh]))[: len(members)]
    return float((ranks.sum() - len(members) * (len(members) + 1) / 2) / members.size / fresh.size)


Scored = list[tuple[np.ndarray, np.ndarray]]


def mean_auc(draws: Scored) -> float:
    """The mean over files."""
    return float(np.mean([auc(m, f) for m, f in draws]))


def interval(draws: Scored, generator: np.random.Generator, times: int = 300) -> list[float]:
    """95 % bootstrap interval: files drawn again, and in each the candidates of both kinds."""
    found = []
    for _ in range(times):
        again = [draws[i] for i in generator.integers(0, len(draws), len(draws))]
        found.append(mean_auc([(generator.choice(m, len(m)), generator.choice(f, len(f)))
                               for m, f in again]))  # fmt: skip
    return [float(x) for x in np.quantile(found, (0.025, 0.975))]


def caught(draws: Scored) -> float:
    """The share of members above all but one in a hundred fresh texts, mean over files."""
    return float(np.mean([(m > np.quantile(f, 0.99)).mean() for m, f in draws]))


class Study:
    """The pools of texts, apart from each other, and what the reader knows."""

    def __init__(self) -> None:
        found = resolve_model("minilm")
        self.model = load_backbone(found.path_or_id).eval()
        self.tokenizer = load_tokenizer(found.path_or_id)
        texts = sorted({row.text for row in get_task("sentiment").pools()["train"]})
        random.Random(0).shuffle(texts)
        self.off = checked(self.model, self.tokenizer, texts[:10])
        bounds = np.cumsum([0, REFERENCE, SHADOW, FRESH])
        used = texts[: bounds[-1] + MEMBERS]
        all_texts = encode(self.model, self.tokenizer, used)
        parts = [all_texts.pick(range(a, b)) for a, b in pairwise(bounds)]
        self.known, self.shadow, self.fresh = parts
        self.members = all_texts.pick(range(bounds[-1], len(used)))
        self.references = {
            "token": reference(self.known),
            "sample": reference(self.known.means()),
        }
        self.random = random.Random(1)

    def scored(self, form: Form, size: int, members: Texts, fresh: Texts, draws: int) -> dict:
        """For every attack the scores of members and of fresh texts, a pair a file."""
        known: list[Reference] = self.references["sample" if form.granularity == "sample" else
                                                 "token"]  # fmt: skip
        found: dict[str, Scored] = {}
        for _ in range(draws):
            inside = self.random.sample(range(len(members)), size)
            outside = self.random.sample(range(len(fresh)), min(CANDIDATES, len(fresh)))
            held = members.pick(inside)
            file = moments_of(held, form)
            sides = (held.pick(range(min(size, CANDIDATES))), fresh.pick(outside))
            if form.granularity == "sample":
                sides = (sides[0].means(), sides[1].means())
            pair = [member_scores(side, file, known) for side in sides]
            for name in pair[0]:
                found.setdefault(name, []).append((pair[0][name].numpy(), pair[1][name].numpy()))
        return found


def membership(study: Study, form: Form, size: int, generator: np.random.Generator) -> dict:
    """The attack that does best on the reader's own files, on files it never saw."""
    shadow = study.shadow.pick(range(SHADOW - CANDIDATES))
    apart = study.shadow.pick(range(SHADOW - CANDIDATES, SHADOW))
    rehearsed = study.scored(form, size, shadow, apart, max(FILES[size] // 4, 1))
    attack = max(rehearsed, key=lambda name: mean_auc(rehearsed[name]))
    draws = study.scored(form, size, study.members, study.fresh, FILES[size])[attack]
    return {
        "what": "membership",
        "form": form.name(),
        "granularity": form.granularity,
        "samples": size,
        "attack": attack,
        "files": len(draws),
        "auc": round(mean_auc(draws), 3),
        "interval": [round(x, 3) for x in interval(draws, generator)],
        "caught": round(caught(draws), 3),
    }


def vocabulary(study: Study, form: Form, size: int) -> dict:
    """The words that the first layer's entry gives away, mean over files."""
    dictionary = Dictionary(study.model)
    special = set(study.tokenizer.all_special_ids)
    found, places = [], []
    for _ in range({1: 2}.get(size, 1)):
        held = study.members.pick(study.random.sample(range(len(study.members)), size))
        leverages = dictionary.leverages(moments_of(_first_layer(held), form)[0])
        found.append(words(leverages, held, study.known, special))
        if size == 1:
            places.append(verbatim(leverages, held.ids[0]))
    row = {"what": "words", "form": form.name(), "granularity": "token", "samples": size}
    for name in ("found", "rare", "prior"):
        values = [getattr(w, name) for w in found if getattr(w, name) == getattr(w, name)]
        row[name] = round(float(np.mean(values)), 3) if values else None
    if places:
        row["in_place"] = round(float(np.mean(places)), 3)
    return row


def _first_layer(texts: Texts) -> Texts:
    return Texts(texts.rows[:1], texts.start, texts.ids)


def rows_told(study: Study, size: int) -> dict:
    """Whether a file of the form `rows` holds rows of the data: the nearest real row of each."""
    held = study.members.pick(study.random.sample(range(len(study.members)), size))
    factor = moments_of(_first_layer(held), Form("token", "rows"))[0].factor
    assert factor is not None
    real = torch.nn.functional.normalize(held.rows[0].double(), dim=1)
    near = (torch.nn.functional.normalize(factor, dim=1) @ real.T).abs().max(1).values
    # The first row of a triangular factor is one: the start mark's, which every text has.
    return {"what": "rows", "form": "rows", "granularity": "token", "samples": size,
            "rows": len(factor), "real": int((near > 0.999).sum())}  # fmt: skip


def main(sizes: Sequence[int] = SIZES) -> None:
    """Attack every form at every size."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    study = Study()
    generator = np.random.default_rng(0)
    rows = [rows_told(study, size) for size in sizes if size <= 100]
    for size in sizes:
        for form in FORMS:
            rows.append(membership(study, form, size, generator))
        for form in WORD_FORMS:
            rows.append(vocabulary(study, form, size))
        keep(study, rows)


def keep(study: Study, rows: list[dict]) -> None:
    """Write what is known so far, by size."""
    save(
        "privacy",
        sorted(rows, key=lambda row: row["samples"]),
        model="MiniLM, the inputs of its six query layers",
        data="movie reviews, the training pool of the task sentiment",
        tokens_a_text=round(float(study.members.start[-1]) / len(study.members), 1),
        off_from_collecting=float(f"{study.off:.1e}"),
        reader=REFERENCE,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    main(parser.parse_args().sizes)
