"""Configurations of LLaMA-Factory and axolotl: whole files, one line of which is ours."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from orthomerge.cli import app

ROOT = Path(__file__).resolve().parents[2]
# The key that takes a start, and what must not stand beside it: it would draw a fresh adapter.
FILES = {
    "llamafactory.yaml": ("adapter_name_or_path", {"create_new_adapter", "init_lora_weights"}),
    "axolotl.yaml": ("lora_model_dir", {"peft_init_lora_weights", "lora_model_merge"}),
}


@pytest.mark.parametrize("name", FILES)
def test_one_line_of_the_file_names_the_start(name):
    text = (ROOT / "examples" / name).read_text(encoding="utf-8")
    key, wrong = FILES[name]
    said = yaml.safe_load(text)
    (marked,) = [line for line in text.splitlines() if "# the one line" in line]
    assert yaml.safe_load(marked) == {key: said[key]}
    assert not wrong & set(said)
    (command,) = [line for line in text.splitlines() if line.startswith("#   orthomerge init ")]
    words = shlex.split(command.removeprefix("#   "))
    assert words[words.index("--output") + 1].rstrip("/") == said[key]
    group = get_command(app)
    with group.make_context("orthomerge", words[1:]) as context:
        _, verb, rest = group.resolve_command(context, words[1:])
        verb.make_context("init", list(rest), parent=context)


@pytest.mark.parametrize("name", FILES)
def test_the_page_shows_the_same_line(name):
    key, _ = FILES[name]
    page = (ROOT / "docs" / "interoperate.md").read_text(encoding="utf-8")
    shown = [b for b in re.findall(r"```yaml\n(.*?)```", page, re.S) if key in yaml.safe_load(b)]
    assert len(shown) == 1
    told = yaml.safe_load((ROOT / "examples" / name).read_text(encoding="utf-8"))
    assert all(told[k] == v for k, v in yaml.safe_load(shown[0]).items())
    assert f"examples/{name}" in page
