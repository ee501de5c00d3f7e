"""Write `docs/paper.md`: the paper's claims and what the kept rows say of each.

python -m benchmarks.paper

Read are all runs of recipes under `results/` (a folder with `recipe.yaml` and `results.jsonl`). A
run that is added there, on whatever base and tasks, is on the page without a change here.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from orthomerge.errors import OrthomergeWarning
from orthomerge.experiment import Recipe, load_recipe
from orthomerge.io.rows import SINGLE, read_rows
from orthomerge.report.aggregate import by_task, mean_over
from orthomerge.report.methods import label_of
from orthomerge.report.summary import PLAIN, percent
from orthomerge.report.written import markdown_grid

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "paper.md"
TEXT = ROOT / "benchmarks" / "paper_page.md"
RESULTS = ROOT / "results"

PAPER, HELD, PROJECTED, PENALTY = "the paper's start", "start held", "projected", "penalty"
POINT, ONE_SEED = 0.01, 0.03
CONFIRMED, NOT_SEEN, REVERSED, NOT_MEASURED = "confirmed", "not seen", "reversed", "not measured"
"""Verdicts."""

Scores = Mapping[int, float]
"""Mean over tasks by seed."""


# ---------------------------------------------------------------------------------------------
# What rows say


class Setting(NamedTuple):
    """An arm's shape and tasks: arms are compared only where these are equal."""

    tasks: int
    rank: int
    layers: str

    def others(self, place: int) -> tuple[object, ...]:
        """All but one of them."""
        return tuple(value for i, value in enumerate(self) if i != place)


@dataclass(frozen=True)
class Study:
    """One run of a recipe."""

    name: str
    recipe: Recipe
    means: Mapping[tuple[str, str, str, float | None], Scores]
    """Mean over the arm's tasks by seed, for arm, split, method with its options, and weight."""

    @property
    def where(self) -> str:
        """Base and kind of tasks, and the run."""
        glue = all(task.startswith("glue/") for task in self.recipe.tasks)
        kind = "GLUE" if glue else "offline tasks"
        return f"{self.recipe.base}, {len(self.recipe.tasks)} {kind} (`{self.name}`)"

    @property
    def on(self) -> str:
        """Base and kind of tasks: settings are compared across the runs on one of these."""
        return self.where.split(" (")[0].replace(f" {len(self.recipe.tasks)} ", " ")

    def setting(self, arm: str) -> Setting:
        """The shape and tasks of an arm."""
        shape = self.recipe.adapter_of(arm)
        return Setting(len(self.recipe.tasks_of(arm)), shape.rank, ", ".join(shape.targets))

    def samples(self, arm: str) -> int:
        """The samples of each task behind the arm's statistics."""
        return self.recipe.arms[arm].samples or self.recipe.statistics.samples

    @cached_property
    def baselines(self) -> list[str]:
        """Arms with a start of PEFT's that are trained freely: the default, then the others."""
        arms = self.recipe.arms
        found = [a for a in arms if arms[a].start in ("default", "gaussian") and _free(self, a)]
        return sorted(found, key=lambda arm: arms[arm].start != "default")

    def kind(self, arm: str) -> str | None:
        """What an arm is to the paper; None for controls and variants that no claim is about."""
        part = self.recipe.arms[arm]
        if part.convert or part.seed_policy == "shared":
            return None
        if part.start in ("min_eigen", "null_space_lapack"):
            return {"init": PAPER, "freeze": HELD, "project": PROJECTED}.get(
                part.constraint, PENALTY
            )
        if part.start == "contrastive" and part.constraint == "project":
            return PROJECTED
        usual = (part.strength, part.penalty_moment, part.isotropic_share) == (10, "others", 0)
        return PENALTY if part.constraint == "penalty" and usual else None

    def sums(self, arm: str) -> dict[float, Scores]:
        """The plain sum by weight."""
        return {
            weight: scores
            for (a, split, label, weight), scores in self.means.items()
            if (a, split, label) == (arm, "test", PLAIN) and weight is not None
        }

    def single(self, arm: str) -> Scores:
        """Each task's own adapter."""
        return self.means.get((arm, "test", SINGLE, None), {})

    def merged(self, arm: str, label: str) -> Scores:
        """A method as published: weight 1, or no fixed weight."""
        found = self.means.get((arm, "test", label, 1.0))
        return found or self.means.get((arm, "test", label, None), {})

    def chosen(self, arm: str, label: str) -> Scores:
        """A method at the weight that was best on selection rows, seed by seed."""
        trials: dict[int, dict[float, float]] = {}
        for (a, split, of, weight), scores in self.means.items():
            if (a, split, of) == (arm, "selection", label) and weight is not None:
                for seed, score in scores.items():
                    trials.setdefault(seed, {})[weight] = score
        best = {s: max(of, key=lambda w: (of[w], -abs(w - 1))) for s, of in trials.items()}
        found = {s: self.means.get((arm, "test", label, w), {}).get(s) for s, w in best.items()}
        return {seed: score for seed, score in found.items() if score is not None}

    def labels(self, arm: str) -> list[str]:
        """The methods that an arm was merged by."""
        found = [of for a, split, of, _ in self.means if (a, split) == (arm, "test")]
        return [of for of in dict.fromkeys(found) if of != SINGLE]


def _free(study: Study, arm: str) -> bool:
    part = study.recipe.arms[arm]
    return part.constraint == "init" and not part.convert and part.seed_policy == "per_task"


def studies(results: Path = RESULTS) -> list[Study]:
    """Every run of a recipe that is kept, by name."""
    folders = [p.parent for p in sorted(results.glob("*/recipe.yaml"))]
    return [_study(folder) for folder in folders if (folder / "results.jsonl").is_file()]


def _study(folder: Path) -> Study:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OrthomergeWarning)  # keys of version 0.1
        recipe, _ = load_recipe(folder / "recipe.yaml")
    rows = [
        r for r in read_rows(folder / "results.jsonl")
        if r.arm in recipe.arms and math.isfinite(r.value)
    ]  # fmt: skip
    rates = {r.arm: r.learning_rate for r in rows if r.split == "test"}
    rows = [r for r in rows if r.learning_rate == rates.get(r.arm)]
    tables = by_task(rows, lambda r: (r.arm, r.split, label_of(r), r.weight, r.seed))
    means: dict[tuple[str, str, str, float | None], dict[int, float]] = {}
    for (arm, split, label, weight, seed), scores in tables.items():
        if (mean := mean_over(recipe.tasks_of(arm), scores)) is not None:
            means.setdefault((arm, split, label, weight), {})[seed] = mean
    return Study(folder.name, recipe, means)


# ---------------------------------------------------------------------------------------------
# Differences and verdicts


@dataclass(frozen=True)
class Difference:
    """One score less another, seed by seed."""

    by_seed: Scores

    @classmethod
    def of(cls, mine: Scores, theirs: Scores) -> Difference | None:
        """Over the seeds that both have; None where there is none."""
        both = sorted(mine.keys() & theirs.keys())
        return cls({seed: mine[seed] - theirs[seed] for seed in both}) if both else None

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return statistics.fmean(self.by_seed.values())

    @property
    def margin(self) -> float:
        """What the mean has to exceed: two standard errors and a point; of one seed, three."""
        values = list(self.by_seed.values())
        if len(values) < 2:
            return ONE_SEED
        return max(2 * statistics.stdev(values) / math.sqrt(len(values)), POINT)

    @property
    def gain(self) -> str:
        """The verdict on "better"."""
        if abs(self.mean) <= self.margin:
            return NOT_SEEN
        return CONFIRMED if self.mean > 0 else REVERSED

    @property
    def kept(self) -> str:
        """The verdict on "no worse"."""
        if self.mean >= -POINT:
            return CONFIRMED
        return REVERSED if self.mean < -self.margin else NOT_SEEN

    def __str__(self) -> str:
        values = list(self.by_seed.values())
        spread = f" ± {percent(statistics.stdev(values))}" if len(values) > 1 else ""
        text = f"{100 * self.mean:+.1f}"
        return ("0.0" if text[1:] == "0.0" else text) + spread


def _score(scores: Scores) -> str:
    values = list(scores.values())
    spread = f" ± {percent(statistics.stdev(values))}" if len(values) > 1 else ""
    return percent(statistics.fmean(values)) + spread if values else "–"


class Pair(NamedTuple):
    """An arm of ours or the paper's, and a baseline of the same shape and tasks."""

    study: Study
    kind: str
    arm: str
    baseline: str

    @property
    def same(self) -> tuple[object, ...]:
        """What comparisons of several runs have in common that are of adapters trained alike."""
        recipe, training = self.study.recipe, self.study.recipe.training
        how = (recipe.data, training.epochs, training.batch_size, training.base_dropout)
        setting = self.study.setting(self.arm)
        return (self.study.on, tuple(recipe.tasks), *how, setting, self.arm, self.baseline)

    @property
    def names(self) -> list[str]:
        """The first cells of a line."""
        return [self.study.where, f"`{self.arm}`", self.kind, f"`{self.baseline}`"]


NAMES = ["base, tasks (run)", "arm", "what it is", "against"]


ORDER = (PAPER, PENALTY, PROJECTED, HELD)
MAIN = (PAPER, PENALTY)
"""The paper's way and the one that is recommended here."""


def pairs(
    found: Iterable[Study], kinds: Iterable[str] = ORDER, size: Callable[[Pair], int] | None = None
) -> list[Pair]:
    """Every comparison there is; the paper's start first.

    Where several runs have the same arms, trained in the same way, the one of the largest `size` is
    shown; without it that of the most seeds.
    """
    made = [
        Pair(study, kind, arm, baseline)
        for study in found
        for arm in study.recipe.arms
        if (kind := study.kind(arm)) in kinds and kind and study.single(arm)
        for baseline in study.baselines
        if study.setting(baseline) == study.setting(arm) and study.single(baseline)
    ]
    return _distinct(sorted(made, key=lambda pair: ORDER.index(pair.kind)), size)


def _distinct(made: list[Pair], size: Callable[[Pair], int] | None = None) -> list[Pair]:
    largest: dict[object, Pair] = {}
    for pair in sorted(made, key=size or (lambda pair: len(pair.study.single(pair.arm)))):
        largest[pair.same] = pair
    return [pair for pair in made if largest[pair.same] is pair]


def _compared(theirs: Scores, mine: Scores) -> tuple[Difference, list[str]] | None:
    """The difference, and its cells: both scores over the seeds that both have, and the seeds."""
    d = Difference.of(mine, theirs)
    if d is None:
        return None
    scores = [_score({seed: of[seed] for seed in d.by_seed}) for of in (theirs, mine)]
    return d, [*scores, str(d), str(len(d.by_seed))]


def area(sums: Mapping[float, Scores], weights: list[float]) -> Scores:
    """The mean height of the curve of the sum over `weights`, by the trapezoid rule, by seed."""
    whole = set.intersection(*(set(sums[w]) for w in weights))
    width = weights[-1] - weights[0]
    steps = list(pairwise(weights))
    return {
        seed: sum((b - a) * (sums[a][seed] + sums[b][seed]) / 2 for a, b in steps) / width
        for seed in sorted(whole)
    }


# ---------------------------------------------------------------------------------------------
# The claims


class Claim(NamedTuple):
    """A claim of the paper, what is said below it, and its lines: cells, kind of arm, verdict."""

    title: str
    said: str
    heads: list[str]
    lines: list[tuple[list[str], str, str]]

    def verdict(self, kind: str) -> str:
        """Of the lines of one kind of arm, by base and tasks."""
        found: dict[str, list[str]] = {}
        for cells, of, verdict in self.lines:
            if of == kind:
                base, tasks = cells[0].split(" (")[0].split(", ")
                found.setdefault(f"{base}, {tasks.split(' ', 1)[1]}", []).append(verdict)
        said = [f"{where}: {_counted(verdicts)}" for where, verdicts in found.items()]
        return "; ".join(said) or NOT_MEASURED

    def text(self) -> str:
        """The claim's part of the page."""
        parts = [f"### {self.title}\n", f"{self.said}\n"]
        if self.lines:
            grid = [[*self.heads, "verdict"], *([*cells, v] for cells, _, v in self.lines)]
            parts.append(markdown_grid(grid, names=4) + "\n")
        else:
            parts.append("No run here has rows for it.\n")
        return "\n".join(parts)


def _counted(verdicts: list[str]) -> str:
    counts = [(v, verdicts.count(v)) for v in (CONFIRMED, NOT_SEEN, REVERSED)]
    return ", ".join(f"{v} {n}" for v, n in counts if n)


def every_method(found: list[Study]) -> Claim:
    """Merged better with every method."""
    lines: list[tuple[list[str], str, str]] = []
    for pair in pairs(found, MAIN, lambda pair: len(pair.study.labels(pair.arm))):
        for how, read in (("as published", Study.merged), ("chosen", Study.chosen)):
            made = _by_method(pair, read)
            if not made:
                continue
            verdicts = [d.gain for d in made.values()]
            means = [d.mean for d in made.values()]
            every = verdicts[0] if len(set(verdicts)) == 1 else NOT_SEEN
            counts = " / ".join(str(verdicts.count(v)) for v in (CONFIRMED, NOT_SEEN, REVERSED))
            seeds = max(len(d.by_seed) for d in made.values())
            median = Difference({0: statistics.median(means)})
            cells = [*pair.names, how, str(len(made)), str(median), counts, str(seeds)]
            lines.append((cells, pair.kind, every))
    return Claim(
        "Merged better, with every method",
        "`as published` is each method at weight 1, `chosen` at the weight that was best on "
        "selection rows. The difference is of the merged scores, the median over methods; then how "
        "many methods are better / not seen / worse. The verdict is of *every* method.",
        [*NAMES, "weight", "methods", "difference", "+ / · / −", "seeds"],
        lines,
    )


def _by_method(pair: Pair, read: Callable[[Study, str, str], Scores]) -> dict[str, Difference]:
    study = pair.study
    made = {
        label: Difference.of(read(study, pair.arm, label), read(study, pair.baseline, label))
        for label in study.labels(pair.arm)
    }
    return {label: d for label, d in made.items() if d is not None}


def single_kept(found: list[Study]) -> Claim:
    """The single score is kept."""
    lines: list[tuple[list[str], str, str]] = []
    for pair in pairs(found, MAIN):
        mine, theirs = pair.study.single(pair.arm), pair.study.single(pair.baseline)
        if found_both := _compared(theirs, mine):
            d, cells = found_both
            lines.append(([*pair.names, *cells], pair.kind, d.kept))
    return Claim(
        "A single adapter loses nothing",
        "Each task's own adapter, mean over tasks. Confirmed: no more than a point below.",
        [*NAMES, "baseline", "arm", "difference", "seeds"],
        lines,
    )


def robust(found: list[Study]) -> Claim:
    """Robust to the merge weight."""
    lines: list[tuple[list[str], str, str]] = []
    for pair in pairs(found, MAIN, lambda pair: len(pair.study.sums(pair.arm))):
        mine, theirs = pair.study.sums(pair.arm), pair.study.sums(pair.baseline)
        seeds = set(pair.study.single(pair.arm)) & set(pair.study.single(pair.baseline))
        weights = [w for w in sorted(mine.keys() & theirs.keys())
                   if seeds <= mine[w].keys() & theirs[w].keys()]  # fmt: skip
        if len(weights) < 3:
            continue
        if found_both := _compared(area(theirs, weights), area(mine, weights)):
            d, cells = found_both
            span = f"{weights[0]:g} to {weights[-1]:g}"
            lines.append(([*pair.names, span, *cells], pair.kind, d.gain))
    return Claim(
        "Robust to the merge weight",
        "The area under the curve of the plain sum over its weight, as a mean height.",
        [*NAMES, "weights", "baseline", "arm", "difference", "seeds"],
        lines,
    )


def by_setting(title: str, said: str, head: str, place: int, found: list[Study]) -> Claim:
    """The gain of the sum at weight 1 wherever one part of the setting takes several values."""
    by_kind: dict[tuple[object, ...], dict[object, list[Pair]]] = {}
    for pair in pairs(found):
        setting = pair.study.setting(pair.arm)
        alike = by_kind.setdefault((pair.kind, pair.study.on, setting.others(place)), {})
        alike.setdefault(setting[place], []).append(pair)
    lines: list[tuple[list[str], str, str]] = []
    for values in by_kind.values():
        if len(values) < 2:
            continue
        for value in sorted(values):  # type: ignore[type-var]
            for pair in values[value]:
                mine, theirs = (pair.study.merged(a, PLAIN) for a in (pair.arm, pair.baseline))
                if found_both := _compared(theirs, mine):
                    d, cells = found_both
                    lines.append(([*pair.names, str(value), *cells], pair.kind, d.gain))
    return Claim(title, said, [*NAMES, head, "baseline", "arm", "difference", "seeds"], lines)


def by_samples(found: list[Study]) -> Claim:
    """A few samples will do."""
    groups: dict[tuple[str, ...], dict[int, tuple[Study, str]]] = {}
    for study in found:
        for arm, part in study.recipe.arms.items():
            kind, sums = study.kind(arm), study.merged(arm, PLAIN)
            if kind and kind != PENALTY and sums:
                how = (part.start, part.granularity, part.constraint)
                shape = tuple(map(str, study.setting(arm)))
                place = groups.setdefault((study.on, kind, *how, *shape), {})
                place.setdefault(study.samples(arm), (study, arm))
    lines: list[tuple[list[str], str, str]] = []
    for (_, kind, *_), by in groups.items():
        if len(by) < 2:
            continue
        most = max(by)
        whole = by[most][0].merged(by[most][1], PLAIN)
        for samples in sorted(set(by) - {most}):
            study, arm = by[samples]
            if found_both := _compared(whole, study.merged(arm, PLAIN)):
                d, cells = found_both
                names = Pair(study, kind, arm, by[most][1]).names
                lines.append(([*names, f"{samples} of {most}", *cells], kind, d.kept))
    return Claim(
        "From 1 to 300 samples per task, the result is about the same",
        "The plain sum at weight 1, against the most samples there are. Confirmed: no more than a "
        "point below.",
        [*NAMES, "samples", "most samples", "arm", "difference", "seeds"],
        lines,
    )


def constraint(found: list[Study]) -> Claim:
    """Where the constraint acts."""
    made = [
        Pair(study, PAPER, free, arm)
        for study in found
        for free, of in study.recipe.arms.items()
        if study.kind(free) == PAPER
        for arm, part in study.recipe.arms.items()
        if study.kind(arm) not in (None, PAPER)
        and (part.start, part.granularity) == (of.start, of.granularity)
        and study.setting(arm) == study.setting(free)
    ]
    lines: list[tuple[list[str], str, str]] = []
    for pair in _distinct(made):
        for head, label in (("single", SINGLE), ("sum × 1", PLAIN)):
            held, free = (pair.study.merged(a, label) for a in (pair.baseline, pair.arm))
            if found_both := _compared(held, free):
                d, cells = found_both
                lines.append(([*pair.names, head, *cells], PAPER, d.gain))
    return Claim(
        "The start is enough: A need not be held",
        "The paper's start trained freely, against the same start held (`freeze`), projected or "
        "with the penalty during training. Confirmed: the free one is better.",
        [*NAMES, "score", "with constraint", "free", "difference", "seeds"],
        lines,
    )


def claims(found: list[Study]) -> list[Claim]:
    """The paper's claims in its order."""
    said = "The plain sum at weight 1, where the setting takes more than one value."
    return [
        every_method(found),
        single_kept(found),
        robust(found),
        by_setting("The gain is there for two to eight tasks", said, "tasks", 0, found),
        by_samples(found),
        by_setting("The gain is there at every rank", said, "rank", 1, found),
        by_setting("The gain is there whichever layers are adapted", said, "layers", 2, found),
        constraint(found),
    ]


def method_grid(found: list[Study]) -> str:
    """Every method on every pair of the paper's start and PEFT's default, as published."""
    parts: list[str] = []
    for study in found:
        mine = [p for p in pairs([study]) if p.kind == PAPER and p.baseline == study.baselines[0]]
        methods = {p.arm: _by_method(p, Study.merged) for p in mine}
        labels = list(dict.fromkeys(of for found in methods.values() for of in found))
        if len(labels) < 3:
            continue
        grid = [["method", f"`{study.baselines[0]}`", *(f"`{arm}`" for arm in methods)]]
        for label in labels:
            scores = [study.merged(arm, label) for arm in (study.baselines[0], *methods)]
            grid.append([f"`{label}`", *map(_score, scores)])
        parts += [f"**{study.where}**\n", markdown_grid(grid) + "\n"]
    return "\n".join(parts)


def figures(found: list[Study]) -> str:
    """What stands in the place of `{claims}`: the verdicts, then each claim with its lines."""
    made = claims(found)
    grid = [["claim", "the paper's start", "the penalty instead"]]
    grid += [[claim.title, claim.verdict(PAPER), claim.verdict(PENALTY)] for claim in made]
    head = markdown_grid(grid, names=3)
    return "\n".join([head, "", *(claim.text() for claim in made), _GRID, method_grid(found)])


_GRID = """### Every method, as published
Mean over tasks × 100, at weight 1 (a distillation finds its own).
"""


def page(results: Path = RESULTS) -> str:
    """The whole page."""
    text = TEXT.read_text(encoding="utf-8")
    return text.replace("{claims}", figures(studies(results)).rstrip("\n"))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
