"""Where outputs may be written: never over or around an input, and over nothing but our own."""

from __future__ import annotations

import json
import shutil

import pytest
from conftest import call, write_task
from small_adapters import make_adapter

from orthomerge.adapters import merge_adapters
from orthomerge.errors import OutputError
from orthomerge.io.files import atomic_path
from orthomerge.io.outputs import require_apart, require_free, require_resumable


@pytest.fixture(scope="module")
def made(tiny_base, tmp_path_factory):
    """A base, adapters, tasks, statistics and a start in one folder, made once."""
    top = tmp_path_factory.mktemp("made")
    shutil.copytree(tiny_base, top / "base")
    for seed, name in enumerate("ab"):
        make_adapter(top / name, top / "base", seed)
        write_task(top / f"{name}.jsonl", 400, seed)
        call("stats", top / "base", "--data", top / f"{name}.jsonl", "--samples", 8,
             "-o", top / f"{name}.stats.safetensors")  # fmt: skip
    call("init", top / "base", "--others", top / "b.stats.safetensors", "--rank", 2,
         "-o", top / "start")  # fmt: skip
    return top


@pytest.fixture
def proj(made, tmp_path):
    """A project of the user's: what is read is next to a thesis."""
    shutil.copytree(made, tmp_path / "proj")
    for name in ("a", "b"):
        file = tmp_path / "proj" / name / "adapter_config.json"
        config = json.loads(file.read_text())
        file.write_text(
            json.dumps({**config, "base_model_name_or_path": str(tmp_path / "proj" / "base")})
        )
    (tmp_path / "proj" / "thesis.txt").write_text("years of work")
    return tmp_path / "proj"


def listing(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def verbs(proj):
    """Every verb that writes a folder, then those that write a file, without their output."""
    stats = ["--stats", proj / "a.stats.safetensors", "--stats", proj / "b.stats.safetensors"]
    tasks = ["--task", proj / "a.jsonl", "--task", proj / "b.jsonl"]
    a, b, base = proj / "a", proj / "b", proj / "base"
    folders = {
        "merge": ["merge", a, b],
        "merge full": ["merge", a, "--save-as", "full"],
        "convert": ["convert", a, b, *stats],
        "init": ["init", base, "--others", proj / "b.stats.safetensors", "--rank", 2],
        "train": ["train", proj / "start", "--base", base, "--task", proj / "a.jsonl",
                  "--rows", 16, "--epochs", 1],
        "distill": ["distill", a, b, "--data", proj / "a.jsonl", "--data", proj / "b.jsonl",
                    "--samples", 8, "--steps", 1],
        "tune": ["tune", a, b, *tasks, "--objective", "entropy", "--steps", 2, "--rows", 16,
                 "--batch-size", 4],
    }  # fmt: skip
    files = {
        "stats": ["stats", base, "--data", proj / "a.jsonl", "--samples", 8],
        "stats merge": ["stats", "merge", *stats[1::2]],
        "stats publish": ["stats", "publish", stats[1], "--directions", 2],
        "fisher": ["fisher", a, "--task", proj / "a.jsonl", "--samples", 8],
    }
    return folders, files


FOLDERS = ["merge", "merge full", "convert", "init", "train", "distill", "tune"]
FILES = ["stats", "stats merge", "stats publish", "fisher"]


@pytest.mark.parametrize("verb", FOLDERS)
def test_no_verb_writes_over_into_or_around_what_it_reads(proj, monkeypatch, verb):
    read = {"init": "base", "train": "start"}.get(verb, "a")
    (proj / "link").symlink_to(proj / read, target_is_directory=True)
    monkeypatch.chdir(proj)
    before = listing(proj)
    # A base that only the adapters name is found out later than that it is not ours.
    words = r"(is|contains|is inside) the |is not empty|no record|no study"
    overwrite = [] if verb == "init" else ["--overwrite"]
    for place in (".", read, "link", f"{read}/inside", "base", "base/inside", "b/../../proj"):
        for more in ([], overwrite):
            with pytest.raises(OutputError, match=rf"the output.* '.*({words})"):
                call(*verbs(proj)[0][verb], "-o", place, *more)
    assert listing(proj) == before


@pytest.mark.parametrize("verb", ["merge", "merge full", "convert", "distill"])
def test_a_base_of_our_own_is_not_replaced_either(proj, tmp_path, verb):
    """Every file of it is ours; the adapters' configuration alone says that it is read."""
    call("merge", proj / "a", "--save-as", "full", "-o", tmp_path / "base")
    for name in "ab":
        file = proj / name / "adapter_config.json"
        config = json.loads(file.read_text())
        file.write_text(json.dumps({**config, "base_model_name_or_path": str(tmp_path / "base")}))
    before = listing(tmp_path / "base")
    for name in ("base", "base/x", "base/../base"):
        with pytest.raises(OutputError, match="the base model"):
            call(*verbs(proj)[0][verb], "-o", tmp_path / name, "--overwrite")
    assert listing(tmp_path / "base") == before


@pytest.mark.parametrize("verb", FOLDERS)
def test_a_folder_is_replaced_only_when_told_and_if_all_of_it_is_ours(proj, tmp_path, verb):
    arguments, out = verbs(proj)[0][verb], tmp_path / "out"
    call(*arguments, "-o", out)
    before = listing(out)
    # A start is replaced by a start, but a merge is not.
    told = [] if verb == "init" else ["--overwrite"]
    if told:
        with pytest.raises(Exception, match=r"'.*' is not empty"):
            call(*arguments, "-o", out)
    else:
        merge_adapters([proj / "a", proj / "b"], output=tmp_path / "merged")
        with pytest.raises(OutputError, match=r"'.*' is not empty"):
            call(*arguments, "-o", tmp_path / "merged")
    below = out / "merged" if verb == "tune" else out
    for name in ("thesis.txt", ".git/HEAD", "sub/notes.md"):
        (below / name).parent.mkdir(exist_ok=True)
        (below / name).write_text("mine")
        with pytest.raises(OutputError, match=f"holds '{name}', which orthomerge did not write"):
            call(*arguments, "-o", out, *told)
        (below / name).unlink()
    (below / "link").symlink_to(proj, target_is_directory=True)
    with pytest.raises(OutputError, match="holds 'link'"):
        call(*arguments, "-o", out, *told)
    (below / "link").unlink()
    assert listing(out) == before
    call(*arguments, "-o", out, *told)
    assert set(listing(out)) == set(before)


@pytest.mark.parametrize("verb", FOLDERS)
def test_a_folder_of_somebody_else_is_never_replaced(proj, tmp_path, verb):
    mine = shutil.copytree(proj / "b", tmp_path / "mine")  # an adapter that PEFT wrote
    (mine / "adapter_config.json").touch()
    before = listing(mine)
    more = [] if verb == "init" else ["--overwrite"]
    with pytest.raises(OutputError, match=r"not empty|no record of orthomerge|holds no study"):
        call(*verbs(proj)[0][verb], "-o", mine, *more)
    assert listing(mine) == before


@pytest.mark.parametrize("verb", FILES)
def test_a_file_is_replaced_only_if_it_is_of_that_kind(proj, tmp_path, verb):
    arguments, out = verbs(proj)[1][verb], tmp_path / "out.safetensors"
    for _ in range(2):
        call(*arguments, "-o", out)
    other = "fisher" if verb != "fisher" else "stats"
    call(*verbs(proj)[1][other], "-o", tmp_path / "other.safetensors")
    shutil.copyfile(proj / "b" / "adapter_model.safetensors", tmp_path / "w.safetensors")
    shutil.copyfile(proj / "thesis.txt", tmp_path / "thesis.txt")
    for foreign in ("other.safetensors", "w.safetensors", "thesis.txt"):
        held = (tmp_path / foreign).read_bytes()
        with pytest.raises(OutputError, match=f"'.*{foreign}' is there already and is no file"):
            call(*arguments, "-o", tmp_path / foreign)
        assert (tmp_path / foreign).read_bytes() == held
    (tmp_path / "empty").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        call(*arguments, "-o", tmp_path / "empty")


@pytest.mark.parametrize("verb", FILES)
def test_no_file_is_written_over_an_input(proj, verb):
    arguments = verbs(proj)[1][verb]
    read = {"stats": "a.jsonl", "fisher": "a.jsonl"}.get(verb, "a.stats.safetensors")
    before = listing(proj)
    with pytest.raises(OutputError, match=r"is the input"):
        call(*arguments, "-o", proj / read)
    assert listing(proj) == before


def test_a_run_begins_in_a_free_folder_and_goes_on_in_its_own(proj, tmp_path):
    from orthomerge.experiment import Run, parse_recipe

    recipe = parse_recipe({
        "name": "t", "base": str(proj / "base"), "statistics": {"samples": 8},
        "tasks": [str(proj / "a.jsonl"), str(proj / "b.jsonl")],
        "data": {"train": 20, "selection": 10, "test": 10}, "training": {"epochs": 1},
        "merges": [{"method": "linear"}], "arms": {"default": {"start": "default"}},
    })  # fmt: skip
    before = listing(proj)
    for place in (proj, proj / "base" / "runs", proj / "base"):
        with pytest.raises(OutputError, match=r"contains the|is inside the|is the"):
            Run(recipe, place).execute()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "results.csv").write_text("mine")
    with pytest.raises(OutputError, match=r"not empty \('results.csv'\) and holds no run"):
        Run(recipe, mine).execute()
    assert listing(proj) == before
    Run(recipe, tmp_path / "run").execute()
    (tmp_path / "run" / "notes.txt").write_text("mine")  # a run replaces no folder of notes
    assert Run(recipe, tmp_path / "run").execute()
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_a_search_begins_in_a_free_folder(proj, tmp_path):
    pytest.importorskip("optuna")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    arguments = ["tune", proj / "a", proj / "b", "--task", proj / "a.jsonl", "--task",
                 proj / "b.jsonl", "--rows", 8, "--trials", 1]  # fmt: skip
    with pytest.raises(OutputError, match="holds no study"):
        call(*arguments, "-o", tmp_path / "mine")
    merge = ["merge", *arguments[1:-4], "--tune", "validation", "--trials", 1, "--rows", 8]
    (tmp_path / "mine").rename(tmp_path / "x.tune")
    with pytest.raises(OutputError, match="holds no study"):
        call(*merge, "-o", tmp_path / "x")
    assert [p.name for p in (tmp_path / "x.tune").iterdir()] == ["notes.txt"]


def test_a_record_that_was_altered_vouches_for_nothing(proj, tmp_path):
    out = tmp_path / "out"
    merge_adapters([proj / "a", proj / "b"], output=out)
    (out / "thesis.txt").write_text("mine")
    record = json.loads((out / "merge.json").read_text())
    record["files"]["thesis.txt"] = "0" * 64
    (out / "merge.json").write_text(json.dumps(record))
    with pytest.raises(OutputError, match="no record"):
        merge_adapters([proj / "a", proj / "b"], output=out, overwrite=True)
    assert (out / "thesis.txt").is_file()


def test_what_came_into_a_folder_during_the_work_is_kept(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(OutputError, match=r"thesis\.txt"), atomic_path(out) as folder:
        folder.mkdir()
        (out / "thesis.txt").write_text("mine")
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_two_names_of_one_place_are_one_place(tmp_path):
    (tmp_path / "real" / "a").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    (tmp_path / "apart").mkdir()
    (tmp_path / "apart" / "a").symlink_to(tmp_path / "real" / "a", target_is_directory=True)
    for output, read in (
        ("link", "real/a"), ("real", "link/a"), ("link/a/x", "real/a"), ("apart", "apart/a"),
        ("real", "apart/a"), ("real/a/../..", "link/a"), ("apart/a/x", "real/a"),
    ):  # fmt: skip
        with pytest.raises(OutputError):
            require_apart(tmp_path / output, [tmp_path / read])
    for output, read in (("apart/b", "real/a"), ("real/ab", "real/a"), ("link/b", "real/a")):
        require_apart(tmp_path / output, [tmp_path / read])
    require_apart(tmp_path / "real", ["org/name", None, object()], "org/base")


def test_what_an_interrupted_beginning_left_is_free(tmp_path):
    out = tmp_path / "out"
    (out / ".merge.json.part-abc").mkdir(parents=True)
    require_free(out, overwrite=True)
    require_resumable(out, ("results.jsonl",), "run")
    (out / "recipe.yaml").touch()
    require_resumable(out, ("results.jsonl",), "run", first=["recipe.yaml"])
    with pytest.raises(OutputError):
        require_resumable(out, ("results.jsonl",), "run")
