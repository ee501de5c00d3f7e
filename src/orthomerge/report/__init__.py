"""Tables, figures and one self-contained page from result rows alone; no model is loaded."""

from orthomerge.report.figures import task_figure, weight_figure
from orthomerge.report.methods import (
    MethodTable,
    markdown_methods,
    method_table,
    methods_json,
)
from orthomerge.report.page import build_comparison, build_report, render_report
from orthomerge.report.tables import (
    Arm,
    Cell,
    Column,
    Score,
    Selection,
    Summary,
    csv_table,
    markdown_table,
    summarize,
)
from orthomerge.report.text import methods_text, summary_table

__all__ = [
    "Arm",
    "Cell",
    "Column",
    "MethodTable",
    "Score",
    "Selection",
    "Summary",
    "build_comparison",
    "build_report",
    "csv_table",
    "markdown_methods",
    "markdown_table",
    "method_table",
    "methods_json",
    "methods_text",
    "render_report",
    "summarize",
    "summary_table",
    "task_figure",
    "weight_figure",
]
