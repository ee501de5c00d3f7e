"""Draw `architecture.svg`: the parts in the layers of pyproject.toml, the imports as they are."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PICTURE = Path(__file__).with_suffix(".svg")
WIDTH, ROW, BOX, GAP = 980, 70, 34, 34
Edges = set[tuple[str, str]]


def layers() -> list[list[str]]:
    """The rows of the picture, from the top: what import-linter holds the imports to."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contract = table["tool"]["importlinter"]["contracts"][0]
    rows = [row.replace("orthomerge.", "").split(" | ") for row in contract["layers"]]
    return [sorted(name.strip() for name in row) for row in rows]


def imports(known: set[str]) -> Edges:
    """Who imports whom, between the known parts of the package."""
    import grimp

    graph = grimp.build_graph("orthomerge", cache_dir=None)
    found = {
        (importer.split(".")[1], imported.split(".")[1])
        for importer in graph.modules
        if "." in importer
        for imported in graph.find_modules_directly_imported_by(importer)
        if "." in imported
    }
    return {(a, b) for a, b in found if a != b and a in known and b in known}


def reduced(edges: Edges) -> Edges:
    """The edges that no longer path stands for."""
    onward: dict[str, set[str]] = {}
    for a, b in edges:
        onward.setdefault(a, set()).add(b)

    def reaches(a: str, b: str) -> bool:
        return any(c == b or reaches(c, b) for c in onward.get(a, ()))

    return {(a, b) for a, b in edges if not any(reaches(c, b) for c in onward[a] - {b})}


def places(rows: list[list[str]], edges: Edges) -> dict[str, tuple[float, float, float]]:
    """Left edge, top and width of every box; a box stands under what imports it, if it can."""
    found: dict[str, tuple[float, float, float]] = {}
    for number, row in enumerate(rows):
        above = {
            name: [found[a][0] + found[a][2] / 2 for a, b in edges if b == name and a in found]
            for name in row
        }
        means = {name: sum(xs) / len(xs) if xs else WIDTH / 2 for name, xs in above.items()}
        # Every second row stands aside, so that what passes a row does not pass behind its boxes.
        means = {name: x + (-1) ** number * 120 for name, x in means.items()}
        widths = {name: 26 + 8.2 * len(name) for name in row}
        left, least = 10.0, sum(widths.values()) + GAP * (len(row) - 1)
        for name in sorted(row, key=lambda n: (means[n], n)):
            wanted = means[name] - widths[name] / 2
            x = max(left, min(wanted, WIDTH - 10 - least))
            found[name] = (round(x, 1), 14.0 + ROW * number, round(widths[name], 1))
            left = x + widths[name] + GAP
            least -= widths[name] + GAP
    return found


def picture() -> str:
    """The whole picture as SVG."""
    rows = layers()
    edges = reduced(imports({name for row in rows for name in row}))
    boxes = places(rows, edges)
    left = min(x for x, _, _ in boxes.values()) - 10
    boxes = {name: (round(x - left, 1), y, w) for name, (x, y, w) in boxes.items()}
    wide = round(max(x + w for x, _, w in boxes.values()) + 10)
    height = 14 + ROW * (len(rows) - 1) + BOX + 14
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {height}" role="img">',
        "<title>Which part of orthomerge imports which, in layers</title>",
        f'<rect width="{wide}" height="{height}" fill="#ffffff"/>',
    ]
    for a, b in sorted(edges):
        (x, y, w), (u, v, q) = boxes[a], boxes[b]
        x, y, u = x + w / 2, y + BOX, u + q / 2
        bend = (v - y) / 2
        curve = f"M{x:.1f} {y:.1f} C{x:.1f} {y + bend:.1f} {u:.1f} {v - bend:.1f} {u:.1f} {v:.1f}"
        lines.append(f'<path d="{curve}" fill="none" stroke="#7a869a" stroke-opacity=".6"/>')
    for name, (x, y, w) in boxes.items():
        lines.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{BOX}" rx="6" fill="#e8eaf6" '
            'stroke="#3f51b5"/>'
            f'<text x="{x + w / 2:.1f}" y="{y + 22}" text-anchor="middle" font-size="14" '
            f'font-family="monospace" fill="#1a237e">{name}</text>'
        )
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
