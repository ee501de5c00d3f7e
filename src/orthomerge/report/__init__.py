"""Tables, figures and one self-contained page from result rows alone; no model is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orthomerge.lazy import first_use

if TYPE_CHECKING:
    from orthomerge.report.aggregate import summarize
    from orthomerge.report.figures import task_figure, weight_figure
    from orthomerge.report.known import known_markdown, known_table, known_text
    from orthomerge.report.methods import method_table
    from orthomerge.report.methods_written import markdown_methods, methods_json
    from orthomerge.report.page import build_comparison, build_report, render_report
    from orthomerge.report.source import read_source
    from orthomerge.report.summary import Column, Summary
    from orthomerge.report.text import methods_text, summary_table
    from orthomerge.report.written import markdown_table

__all__ = [
    "Column",
    "Summary",
    "build_comparison",
    "build_report",
    "known_markdown",
    "known_table",
    "known_text",
    "markdown_methods",
    "markdown_table",
    "method_table",
    "methods_json",
    "methods_text",
    "read_source",
    "render_report",
    "summarize",
    "summary_table",
    "task_figure",
    "weight_figure",
]

__getattr__ = first_use(__name__)
