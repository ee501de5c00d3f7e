"""Put faults into a run and into every verb, and write `docs/faults.md` from what came of them.

python tests/faults/faults.py --faults 200    # without --faults, the page alone
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PAGE = ROOT / "docs" / "faults.md"
TEXT = HERE / "faults_page.md"
FILE = HERE / "results" / "faults.json"
# What a look at the folder after a sitting may find.
PROBLEMS = (
    "wrong rows", "wrong tables", "lost rows", "lost jobs", "jobs done again", "broke",
    "not one sentence",
)  # fmt: skip


def page(found: dict[str, Any]) -> str:
    """The page: its text, with tables and figures in the places named in braces."""
    run = found["run"]
    text = TEXT.read_text(encoding="utf-8")
    places = {
        "{date}": found["date"],
        "{injected}": str(run["injected"]),
        "{sittings}": str(run["sittings"]),
        "{finished}": str(run["runs finished"]),
        "{rows}": str(run["rows of a run"]),
        "{operations}": str(run["operations of a run"]),
        "{failures}": str(len(run["failures"])),
        "{note}": found.get("note", ""),
        "{run}": _run_table(run),
        "{verbs}": _verb_table(found["verbs"]),
    }
    for place, value in places.items():
        text = text.replace(place, value)
    return "\n".join(line.rstrip() for line in text.split("\n"))


def _run_table(run: dict[str, Any]) -> str:
    lines = [
        "| fault | injected | how the call ended | rows or jobs lost | wrong rows or tables |",
        "| --- | ---: | --- | ---: | ---: |",
    ]
    for kind, tally in run["kinds"].items():
        ended = {k: n for k, n in tally.items() if k not in (*PROBLEMS, "injected")}
        how = ", ".join(f"{name} {n}" for name, n in sorted(ended.items()))
        lost = sum(tally.get(k, 0) for k in ("lost rows", "lost jobs", "jobs done again"))
        wrong = sum(tally.get(k, 0) for k in ("wrong rows", "wrong tables"))
        lines.append(f"| {kind} | {tally.get('injected', 0)} | {how} | {lost} | {wrong} |")
    lines += [f"| {kind} | skipped: {why} | | | |" for kind, why in run["skipped"].items()]
    return "\n".join(lines)


def _verb_table(verbs: dict[str, Any]) -> str:
    lines = [
        "| verb | operations on the disk | faults | all of the old | all of the new | neither |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, verb in verbs.items():
        neither = verb["faults"] - verb["old"] - verb["new"]
        lines.append(
            f"| `{name}` | {verb['operations']} | {verb['faults']} | {verb['old']} "
            f"| {verb['new']} | {neither} |"
        )
    return "\n".join(lines)


def measure(faults: int, seed: int, points: int) -> dict[str, Any]:
    """Run both programs; what they found."""
    found = {"date": datetime.now(UTC).strftime("%Y-%m-%d")}
    with tempfile.TemporaryDirectory() as top:
        for name, program, how in (
            ("run", "campaign", ["--faults", faults, "--seed", seed]),
            ("verbs", "verbs", ["--points", points]),
        ):
            done = subprocess.run(
                [sys.executable, str(HERE / f"{program}.py"), f"{top}/{name}", *map(str, how)],
                stdout=subprocess.PIPE, text=True, check=True,
            )  # fmt: skip
            found[name] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Parse, measure where asked to, write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--points", type=int, default=4)
    asked = parser.parse_args()
    if asked.faults:
        found = measure(asked.faults, asked.seed, asked.points)
        FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    found = json.loads(FILE.read_text(encoding="utf-8"))
    PAGE.write_text(page(found), encoding="utf-8")
    failures = found["run"]["failures"] + [
        f for v in found["verbs"].values() for f in v["failures"]
    ]
    print("\n".join(failures) or f"{PAGE.relative_to(ROOT)}: no failure")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
