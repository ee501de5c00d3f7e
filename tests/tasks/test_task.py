"""The contract of a task, on tasks made here."""

from __future__ import annotations

import pytest

from orthomerge.errors import TaskError, UnknownNameError
from orthomerge.tasks import Row, Task, get_task, list_tasks, majority


def make_task(pools, kind="classification") -> Task:
    labels = ("no", "yes") if kind == "classification" else ()
    return Task(
        name="made",
        title="Made",
        kind=kind,
        labels=labels,
        metric="accuracy",
        source="",
        licence="",
        made="",
        pair=False,
        pools=lambda: pools,
    )


def rows(start: int, stop: int) -> list[Row]:
    return [Row(f"text {i}", None, i % 2) for i in range(start, stop)]


THREE = {"train": rows(0, 60), "selection": rows(60, 80), "test": rows(80, 120)}
TWO = {"train": rows(0, 80), "test": rows(80, 120)}


@pytest.mark.parametrize("pools", [THREE, TWO], ids=["three pools", "two pools"])
def test_samples_are_seeded_sized_and_disjoint(pools):
    task = make_task(pools)
    data = task.data(train=30, selection=20, test=25, seed=3)
    assert [len(p) for p in (data.train, data.selection, data.test)] == [30, 20, 25]
    assert data == task.data(train=30, selection=20, test=25, seed=3)
    assert data.fingerprint != task.data(train=30, selection=20, test=25, seed=4).fingerprint
    assert data.train != pools["train"][:30]
    assert len({r.text for p in (data.train, data.selection, data.test) for r in p}) == 75


@pytest.mark.parametrize("pools", [THREE, TWO], ids=["three pools", "two pools"])
def test_a_smaller_sample_begins_a_larger_one(pools):
    task = make_task(pools)
    small = task.data(train=20, selection=10, test=10)
    large = task.data(train=40, selection=10, test=20)
    assert large.train[:20] == small.train
    assert large.test[:10] == small.test
    assert large.selection == small.selection


@pytest.mark.parametrize(
    ("pools", "sizes", "message"),
    [
        (THREE, (61, 1, 10), "has 60 train rows, not 61"),
        (THREE, (10, 21, 10), "has 20 selection rows, not 21"),
        (THREE, (10, 1, 41), "has 40 test rows, not 41"),
        (TWO, (70, 20, 10), "has 60 train rows, not 70"),
        (THREE, (-1, 1, 10), "not -1"),
        ({**THREE, "train": rows(0, 60)[::2]}, (10, 1, 10), "train rows .* carry one label"),
        ({**THREE, "test": rows(80, 120)[::2]}, (10, 1, 10), "test rows .* carry one label"),
    ],
)
def test_rows_that_cannot_be_used_are_an_error(pools, sizes, message):
    train, selection, test = sizes
    with pytest.raises(TaskError, match=message) as caught:
        make_task(pools).data(train=train, selection=selection, test=test)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_majority():
    assert majority([Row("", None, x) for x in (0, 1, 1)], "classification") == 1
    assert majority([Row("", None, x) for x in (1, 0)], "classification") == 0
    assert majority([Row("", None, x) for x in (1.0, 4.0)], "regression") == 2.5
    with pytest.raises(TaskError):
        majority([], "classification")


def test_names_are_unique_and_an_unknown_one_lists_them():
    names = [task.name for task in list_tasks()]
    assert len(names) == len(set(names)) == 16
    assert all(get_task(name).name == name for name in names)
    with pytest.raises(UnknownNameError, match="did you mean 'sentiment'") as caught:
        get_task("sentimnt")
    assert all(name in str(caught.value) for name in names)


def test_parts_of_a_task_share_no_text_and_together_are_the_whole():
    whole = get_task("acceptability").pools()
    parts = [get_task(f"acceptability@{i}/2").pools() for i in (1, 2)]
    for split, rows in whole.items():
        found = [{r.text for r in part[split]} for part in parts]
        assert not found[0] & found[1]
        assert sorted(parts[0][split] + parts[1][split]) == sorted(rows)
        assert 0.4 < len(parts[0][split]) / len(rows) < 0.6
    assert get_task("acceptability@2/2").name == "acceptability@2/2"
    with pytest.raises(TaskError, match="no part 3 of 2"):
        get_task("acceptability@3/2")
    with pytest.raises(UnknownNameError, match="did you mean 'sentiment'"):
        get_task("sentimen@1/2")
