"""`orthomerge list`: the methods, solvers, tasks, models and recipes that there are by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from orthomerge.cli._app import app, out, print_json, table
from orthomerge.cli._options import Count, Json
from orthomerge.errors import RecipeError, unknown_name


@app.command("list")
def list_(
    what: Annotated[str | None, typer.Argument()] = None,
    export_harness: Path | None = None,
    task: list[str] | None = None,
    template: str | None = None,
    rows: Count = 300,
    seed: int = 0,
    json: Json = False,
) -> None:
    """List what can be named: merging methods, solvers, tasks, packaged models, recipes.

    Examples: [bold]orthomerge list methods[/]

    [bold]orthomerge list tasks --json[/]

    [bold]orthomerge list tasks --export-harness tasks/ --task sentiment[/]

    Args:
        what: methods, solvers, tasks, models or recipes; without it, all names.
        export_harness: With tasks: write their test rows as tasks of lm-evaluation-harness into
            this folder instead.
        task: A task to export, or a table of yours; repeat; default all offline.
        template: An instruction with {text}, or a .txt or YAML file of one.
        rows: Test rows of an exported task.
        seed: Seed of the exported rows.
    """
    if what is not None and what not in _LISTS:
        raise unknown_name("list", what, _LISTS, where="orthomerge list", error=RecipeError)
    if export_harness is not None:
        if what not in (None, "tasks"):
            raise RecipeError("--export-harness writes tasks: call 'orthomerge list tasks'.")
        export_tasks(export_harness, task or [], template, rows, seed, as_json=json)
    elif task or template:
        raise RecipeError("--task and --template go with --export-harness, which writes them.")
    elif what is not None:
        rows_of, show = _LISTS[what]
        found = rows_of()
        print_json(found) if json else show(found)
    else:
        names = {kind: [row["name"] for row in rows_of()] for kind, (rows_of, _) in _LISTS.items()}
        print_json(names) if json else _show_names(names)


def _show_names(names: dict[str, list[str]]) -> None:
    for kind, found in names.items():
        out.print(f"[bold]{kind}[/]: {', '.join(found)}", highlight=False)
    out.print("More of each: orthomerge list methods", highlight=False)


Rows = list[dict[str, Any]]


def methods() -> Rows:
    """The merging methods, their aliases, options and papers."""
    from orthomerge.merging import list_methods

    return [
        {"name": m.name, "aliases": list(m.aliases), "title": m.title, "summary": m.summary,
         "paper": m.paper, "url": m.url, "options": dict(m.options), "low_rank": m.low_rank,
         "needs": list(m.needs), "per_task": m.per_task, "default_weight": m.weight_rule({})}
        for m in list_methods()
    ]  # fmt: skip


def solvers() -> Rows:
    """The solvers that choose A, with their options."""
    from orthomerge.subspace import list_solvers

    return [
        {"name": s.name, "title": s.title, "paper": s.paper, "needs_own": s.needs_own,
         "joint": s.joint, "options": dict(s.options)}
        for s in list_solvers()
    ]  # fmt: skip


def tasks() -> Rows:
    """The labelled tasks, how they are made and under what licence."""
    from orthomerge.tasks import list_tasks

    return [
        {"name": t.name, "title": t.title, "kind": t.kind, "labels": list(t.labels),
         "metric": t.metric, "source": t.source, "licence": t.licence, "made": t.made}
        for t in list_tasks()
    ]  # fmt: skip


def models() -> Rows:
    """The base models that packages carry."""
    from orthomerge.models.packaged import PACKAGED

    return [
        {"name": p.ids[0], "ids": list(p.ids), "size": p.size, "licence": p.licence}
        for p in PACKAGED
        if p.ids
    ]


def recipes() -> Rows:
    """The recipes that come with the package."""
    from orthomerge.recipes import packaged_recipes

    return [{"name": name} for name in sorted(packaged_recipes())]


def show_methods(found: Rows) -> None:
    """The methods as a table."""
    shown = Table(title="merging methods", box=SIMPLE, pad_edge=False)
    shown.add_column("method", no_wrap=True)
    shown.add_column("when to use it, and its options", ratio=1)
    shown.add_column("paper", max_width=24)
    for row in found:
        shown.add_row(f"[bold]{row['name']}[/]", _about_method(row), row["paper"])
    out.print(shown)


def _about_method(row: dict[str, Any]) -> str:
    """Summary, aliases, options and what the method needs, a line each."""
    lines = [escape(row["summary"])]
    if row["aliases"]:
        lines.append(f"[dim]the same under other names: {', '.join(row['aliases'])}[/]")
    if row["options"]:
        options = (f"{k.rstrip('_')}={v}" for k, v in row["options"].items())
        lines.append(f"[cyan]{escape('  '.join(options))}[/]")
    given = {
        "moments": "each task's statistics (--stats)",
        "fisher": "each adapter's Fisher information (--fisher)",
    }
    if row["needs"]:
        lines.append(f"[yellow]needs {' and '.join(given[what] for what in row['needs'])}[/]")
    lines.append(f"[dim]weight where none is given: {row['default_weight']}[/]")
    if row["per_task"]:
        lines.append("[yellow]also writes one adapter per task[/]")
    return "\n".join(lines)


def show_solvers(found: Rows) -> None:
    """The solvers as a table."""
    shown = table("solver", "what it chooses", "options", "source", numbers=False)
    for row in found:
        options = ", ".join(f"{k}={v}" for k, v in row["options"].items())
        shown.add_row(f"[bold]{row['name']}[/]", row["title"], options, row["paper"])
    out.print(shown)


def show_tasks(found: Rows) -> None:
    """The tasks as a table."""
    shown = table("task", "what", "metric", "how it is made", "licence", numbers=False)
    for row in found:
        name = f"[bold]{row['name']}[/]"
        shown.add_row(name, row["title"], row["metric"], row["made"], row["licence"])
    out.print(shown)


def show_models(found: Rows) -> None:
    """The packaged models as a table."""
    from orthomerge.io.units import human_size

    shown = table("model", "also named", "download", "licence", numbers=False)
    shown.title = "packaged models: fetched on first use"
    for row in found:
        others = ", ".join(row["ids"][1:])
        shown.add_row(f"[bold]{row['name']}[/]", others, human_size(row["size"]), row["licence"])
    out.print(shown)


def show_recipes(found: Rows) -> None:
    """The recipes, a line each."""
    for row in found:
        out.print(row["name"], highlight=False)


def export_tasks(
    folder: Path, names: list[str], template: str | None, rows: int, seed: int, *, as_json: bool
) -> None:
    """Tasks as files of the harness; by default every classification that needs no hub."""
    from orthomerge.evaluation.harness import export_task
    from orthomerge.tasks import get_task, list_tasks, prompt_of

    chosen = [get_task(name) for name in names] or [
        t for t in list_tasks() if t.labels and not t.name.startswith("glue/")
    ]
    prompts = [prompt_of(task, template) for task in chosen]
    files = [
        export_task(task, prompt, folder, rows=rows, seed=seed)
        for task, prompt in zip(chosen, prompts, strict=True)
    ]
    if as_json:
        print_json([{"task": f.stem, "path": str(f), "rows": rows} for f in files])
        return
    for file in files:
        out.print(f"{file}: {rows} rows.", highlight=False, soft_wrap=True)
    listed = ",".join(f.stem for f in files)
    out.print(
        f"run them: lm-eval run --include_path {folder} --tasks {listed} --model hf ..., or "
        f"orthomerge eval ADAPTER --harness {folder}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


_LISTS: dict[str, tuple[Callable[[], Rows], Callable[[Rows], None]]] = {
    "methods": (methods, show_methods),
    "solvers": (solvers, show_solvers),
    "tasks": (tasks, show_tasks),
    "models": (models, show_models),
    "recipes": (recipes, show_recipes),
}
