"""Tasks from the user's own tables."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from orthomerge.errors import TaskError
from orthomerge.tasks import from_file, get_task

TABLE = pd.DataFrame(
    {
        "text": [f"line {i}" for i in range(60)],
        "pair": [f"other {i}" for i in range(60)],
        "label": ["good" if i % 2 else "bad" for i in range(60)],
        "number": [i / 7 for i in range(60)],
        "rank": [i % 3 for i in range(60)],
        "flag": [i % 2 == 0 for i in range(60)],
    }
)


def write(path, table=TABLE):
    if path.suffix == ".csv":
        table.to_csv(path, index=False)
    elif path.suffix == ".jsonl":
        table.to_json(path, orient="records", lines=True)
    else:
        table.to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_three_formats_give_the_same_rows(tmp_path, suffix):
    task = get_task(str(write(tmp_path / f"mine{suffix}")))
    reference = from_file(write(tmp_path / "reference.csv"))
    assert task.pools() == reference.pools()
    assert (task.kind, task.labels, task.pair) == ("classification", ("bad", "good"), True)
    data = task.data(train=20, selection=5, test=8)
    assert len({r.text for p in (data.train, data.selection, data.test) for r in p}) == 33


@pytest.mark.parametrize(
    ("column", "kind", "labels"),
    [
        ("label", "classification", ("bad", "good")),
        ("rank", "classification", ("0", "1", "2")),
        ("flag", "classification", ("False", "True")),
        ("number", "regression", ()),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_the_kind_follows_the_labels(tmp_path, suffix, column, kind, labels):
    task = from_file(write(tmp_path / f"mine{suffix}"), label_column=column, name="mine")
    assert (task.name, task.kind, task.labels) == ("mine", kind, labels)
    value = task.pools()["train"][0].label
    assert isinstance(value, int if labels else float)


def test_the_same_text_stays_in_one_split(tmp_path):
    table = pd.DataFrame(
        {"text": [f"line {i % 20}" for i in range(60)], "label": ["a", "b", "c"] * 20}
    )
    pools = from_file(write(tmp_path / "mine.csv", table)).pools()
    assert not {r.text for r in pools["train"]} & {r.text for r in pools["test"]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,other\nx,1\n", "no column 'label': it has text, other"),
        ("b.csv", "text,label\nx,\ny,1\n", "1 empty cells in column 'label'"),
        ("c.csv", "text,label\n", "has no rows"),
        ("d.jsonl", "{broken", "cannot be read as .jsonl"),
        ("e.parquet", "no parquet", "cannot be read as .parquet"),
        ("f.csv", "", "cannot be read as .csv"),
        ("g.txt", "x", "must end in .csv, .tsv, .jsonl, .json, .parquet"),
    ],
)
def test_a_bad_table_is_one_sentence(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(TaskError, match=message) as caught:
        from_file(path)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(TaskError, match="there is no file"):
        get_task(str(tmp_path / "nothing.csv"))


def test_a_file_with_one_label_is_refused_when_drawn(tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text("".join(json.dumps({"text": f"t{i}", "label": "x"}) + "\n" for i in range(40)))
    with pytest.raises(TaskError, match="one label"):
        from_file(path).data(train=5, selection=2, test=5)
