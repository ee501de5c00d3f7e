"""What MkDocs does not do itself: pages of the repository's root, generated pages, links, lists."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

from commands import commands_page
from mkdocs.structure.files import File, Files
from names import names_page

ROOT = Path(__file__).resolve().parents[2]
ROOT_PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "LOG.md": "log.md",
    "SECURITY.md": "security.md",
}
# What pages link to beside pages: these come along as they are.
ALONG = (
    "CITATION.cff",
    "recipes",
    "examples",
    "results",
    "benchmarks",
    "src",
    "tests",
    "docs/site",
)
# Pages alone in their tab: no list of neighbours, so more room for commands and tables.
ALONE = ("index.md", "tutorial.md")
_LINK = re.compile(r"(\]\(|\]: )([^)#\s]+)(?=[)#\s]|$)", re.MULTILINE)
# A link whose text is the name of a page: on the site, pages have titles.
_NAMED = re.compile(r"\[([\w./-]+\.md)\](?=\(([^)#\s]+))")
_ITEM = re.compile(r"(?:[-*]|\d+\.) ")


def on_files(files: Files, *, config: Any) -> Files:
    """Add the root's pages, the generated pages, and what any page links to outside docs/."""
    pages = {page.src_uri: page.content_string for page in files.documentation_pages()}
    for name, uri in ROOT_PAGES.items():
        if (ROOT / name).is_file():
            pages[uri] = (ROOT / name).read_text(encoding="utf-8")
            files.append(File.generated(config, uri, content=pages[uri]))
    files.append(File.generated(config, "reference/commands.md", content=commands_page()))
    files.append(File.generated(config, "reference/python.md", content=names_page()))
    for uri, text in pages.items():
        for _, target in _LINK.findall(text):
            path = _in_repository(uri, target)
            along = path and path.startswith(ALONG) and (ROOT / path).is_file()
            if path and along and files.get_file_from_path(path) is None:
                files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_config(config: Any) -> Any:
    """Give every page that the navigation does not name a place under How-to."""
    named = re.findall(r"'([\w/-]+\.md)'", str(config.nav))
    for path in sorted((ROOT / "docs").glob("*.md")):
        if path.name not in named:
            next(part["How-to"] for part in config.nav if "How-to" in part).append(path.name)
    return config


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Links between files as links between pages, by their titles; an empty line before a list."""

    def turned(match: re.Match[str]) -> str:
        path = _in_repository(page.file.src_uri, match[2])
        if path is None:
            return match[0]
        target = ROOT_PAGES.get(path, path.removeprefix("docs/"))
        up = "../" * page.file.src_uri.count("/")
        return f"{match[1]}{up}{target}"

    def titled(match: re.Match[str]) -> str:
        path = _in_repository(page.file.src_uri, match[2])
        heading = path and re.match(r"# (.+)", (ROOT / path).read_text(encoding="utf-8"))
        return f"[{heading[1]}]" if heading else match[0]

    markdown = _NAMED.sub(titled, markdown)
    if page.file.src_uri in ALONE:
        page.meta["hide"] = ["navigation"]
    return _spaced(_LINK.sub(turned, markdown))


def _in_repository(uri: str, target: str) -> str | None:
    """What a link means in the repository, as a path from its root; None for another host."""
    if re.match(r"\w+:|/", target) or uri.startswith("reference/"):
        return None
    home = next((name for name, known in ROOT_PAGES.items() if known == uri), f"docs/{uri}")
    parts: list[str] = []
    for part in (PurePosixPath(home).parent / target).parts:
        if part == "..":
            parts.pop()
        else:
            parts.append(part)
    return "/".join(parts)


def _spaced(markdown: str) -> str:
    """An empty line before a list, which Python-Markdown wants; figures unbroken in tables."""
    lines: list[str] = []
    fenced = False
    for line in markdown.splitlines():
        fenced ^= line.startswith("```")
        if line.startswith("|"):  # a figure stays with its spread
            line = line.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")
        before = lines[-1] if lines else ""
        inside = before.startswith(" ") or _ITEM.match(before)
        if not fenced and _ITEM.match(line) and before.strip() and not inside:
            lines.append("")
        lines.append(line)
    return "\n".join(lines) + "\n"
