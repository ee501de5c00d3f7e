"""Statistics and Fisher information of tasks in words: collected, started from, merged with."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import call
from safetensors.torch import load_file, save_file
from tiny_text import easy_task, save_tiny

from orthomerge.adapters import read_adapter
from orthomerge.errors import AdapterError, OrthomergeError, RecipeError, StatisticsError
from orthomerge.fisher import load_fisher
from orthomerge.models.loading import load_language_model, load_tokenizer
from orthomerge.prompting import Wording
from orthomerge.statistics import Statistics, collect_statistics, sample_texts
from orthomerge.tasks import get_task, prompt_of

KINDS = {
    "decoder": ("CAUSAL_LM", "q_proj,o_proj,down_proj"),
    "encoder-decoder": ("SEQ_2_SEQ_LM", "q,k,wo"),
}
TARGETS = dict(KINDS.values())
TEMPLATE = "Text: {text}\nAnswer:"
WORDS = ("--form", "text", "--template", TEMPLATE)


@pytest.fixture(scope="module", params=list(KINDS))
def made(request, tmp_path_factory):
    """A base, two tasks with statistics and an adapter each, as the commands make them."""
    folder = tmp_path_factory.mktemp(request.param)
    kind, targets = KINDS[request.param]
    base = save_tiny(folder / "base", seq2seq=kind == "SEQ_2_SEQ_LM")
    easy_task(folder / "a.jsonl", ("king", "queen"), 90, seed=0)
    easy_task(folder / "b.jsonl", ("red", "blue"), 90, seed=1)
    for name in "ab":
        said = call("stats", base, "--data", folder / f"{name}.jsonl", *WORDS, "--targets", targets,
                    "--samples", 30, "--output", folder / f"{name}.st")  # fmt: skip
        assert "of prompts and answers" in said
    for seed, (own, other) in enumerate(("ab", "ba")):
        call("init", base, "--others", folder / f"{other}.st", "--own", folder / f"{own}.st",
             "--task-type", kind, "--rank", 4, "--output", folder / f"start-{own}")  # fmt: skip
        begun = read_adapter(folder / f"start-{own}")
        assert begun.config["task_type"] == kind and not begun.modules
        # What training would leave, without its time: a B that is not zero.
        weights = load_file(folder / f"start-{own}" / "adapter_model.safetensors")
        g = torch.Generator().manual_seed(seed)
        drawn = {
            n: torch.randn(w.shape, generator=g) * 0.1 if "lora_B" in n else w
            for n, w in weights.items()
        }
        save_file(drawn, folder / f"start-{own}" / "adapter_model.safetensors")
    return folder, base, kind


def whole_moments(folder, base, name, layers):
    """Every layer's second moment by hooks on the language model itself, a prompt at a time."""
    model, tokenizer = load_language_model(str(base)), load_tokenizer(str(base))
    task = get_task(str(folder / f"{name}.jsonl"))
    wording = Wording.of(prompt_of(task, TEMPLATE), tokenizer, model.config)
    texts = sample_texts([(r.text, r.pair) for r in task.pools()["train"]], 30, 0)
    sums = {layer: [0.0, 0] for layer in layers}

    def hook(layer):
        def read(_module, args):
            rows = args[0].detach().flatten(0, -2).double()
            sums[layer][0] += rows.T @ rows
            sums[layer][1] += len(rows)

        return read

    handles = [model.get_submodule(n).register_forward_pre_hook(hook(n)) for n in layers]
    with torch.no_grad():
        for batch in wording.batches(texts, batch_size=1):
            assert all(bool(m.all()) for n, m in batch.items() if n.endswith("attention_mask"))
            model(**batch)
    for handle in handles:
        handle.remove()
    return {layer: S / n for layer, (S, n) in sums.items()}


def test_moments_of_prompts_are_found_under_the_language_models_names(made):
    """They are collected on the base without its head; adapters name layers with it."""
    folder, base, _kind = made
    statistics = Statistics.load(folder / "a.st")
    layers = list(read_adapter(folder / "start-a").layers)
    assert statistics.meta.form == "text" and len(layers) == len(statistics.layers)
    for layer, wanted in whole_moments(folder, base, "a", layers).items():
        found = statistics.second_moment(layer)
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-6 * float(wanted.diag().max()))
    # Collected on the model with its head they are the same, under the same names.
    model, tokenizer = load_language_model(str(base)), load_tokenizer(str(base))
    wording = Wording.of(prompt_of(get_task(str(folder / "a.jsonl")), TEMPLATE), tokenizer,
                         model.config)  # fmt: skip
    whole = collect_statistics(
        model, wording.batches([("the red king", None)]), statistics.meta.target_modules
    )
    assert whole.layers == statistics.layers
    assert whole.meta.config_hash == statistics.meta.config_hash


@pytest.mark.parametrize("method", ["regmean", "osrm_aware"])
def test_least_squares_on_prompts_is_that_of_the_dense_updates(made, tmp_path, method):
    folder, base, kind = made
    options = {
        "regmean": ("--option", "alpha=1.0", "--option", "ridge=1e-3"),
        "osrm_aware": ("--option", "balance=false", "--option", "ridge=1e-3"),
    }[method]
    call("merge", folder / "start-a", folder / "start-b", "--method", method, *options,
         "--stats", folder / "a.st", "--stats", folder / "b.st", "--base", base,
         "--output", tmp_path / "merged")  # fmt: skip
    merged = read_adapter(tmp_path / "merged")
    assert merged.config["task_type"] == kind and not merged.modules
    layers = [read_adapter(folder / f"start-{n}").layers for n in "ab"]
    moments = [whole_moments(folder, base, n, list(layers[0])) for n in "ab"]
    for name in layers[0]:
        S = [m[name] + 1e-3 * m[name].diag().mean() * torch.eye(len(m[name])) for m in moments]
        deltas = [each[name].delta().double() for each in layers]
        wanted = sum(d @ s for d, s in zip(deltas, S, strict=True)) @ torch.linalg.inv(sum(S))
        found = merged.layers[name].delta().double()
        assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def test_labels_are_not_looked_at(made, tmp_path):
    folder, base, kind = made
    rows = [json.loads(line) for line in (folder / "a.jsonl").read_text().splitlines()]
    turned = [r | {"label": "yes" if r["label"] == "no" else "no"} for r in rows]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, turned)))
    call("stats", base, "--data", tmp_path / "a.jsonl", *WORDS, "--targets", TARGETS[kind],
         "--samples", 30, "--output", tmp_path / "a.st")  # fmt: skip
    assert (tmp_path / "a.st").read_bytes() == (folder / "a.st").read_bytes()


def test_fisher_information_says_its_form(made, tmp_path):
    folder, base, kind = made
    file = tmp_path / "a.fisher.safetensors"
    said = call("stats", "fisher", folder / "start-a", "--task", folder / "a.jsonl", *WORDS,
                "--samples", 6, "--base", base, "--output", file, "--json")  # fmt: skip
    assert json.loads(said)["form"] == "text"
    adapter = read_adapter(folder / "start-a")
    found = load_fisher(file, adapter_sha256=adapter.sha256)
    assert set(found) == set(adapter.layers) and found.meta.prompt
    assert all(value.max() > 0 for value in found.values())
    with pytest.raises(AdapterError, match=rf"\({kind}\) and has no head: .*--form text"):
        call("stats", "fisher", folder / "start-a", "--task", folder / "a.jsonl", "--form",
             "classifier", "--output", tmp_path / "x")  # fmt: skip


def test_statistics_of_another_form_are_noticed(made, tmp_path):
    folder, base, kind = made
    plain, other = tmp_path / "plain.st", tmp_path / "other.st"
    about = ("--targets", TARGETS[kind], "--samples", 30)
    call("stats", base, "--data", folder / "b.jsonl", *about, "--output", plain)
    call("stats", base, "--data", folder / "a.jsonl", *WORDS[:2], *about, "--output", other)
    start = ("--own", folder / "a.st", "--output", tmp_path / "start")
    with pytest.raises(StatisticsError, match=r"differ in their form \((text|classifier)"):
        call("init", base, "--others", plain, *start, "--task-type", kind)
    with pytest.raises(StatisticsError, match=r"on prompts .*a classifier's \(SEQ_CLS\)"):
        call("init", base, "--others", folder / "b.st", *start, "--task-type", "SEQ_CLS")
    with pytest.raises(StatisticsError, match="of the form 'classifier'"):
        call("merge", folder / "start-a", folder / "start-b", "--method", "regmean",
             "--stats", folder / "a.st", "--stats", plain, "--output", tmp_path / "m")  # fmt: skip
    with pytest.raises(StatisticsError, match="different prompts"):
        call("stats", "merge", folder / "a.st", other, "--output", tmp_path / "sum")
    assert "text, prompt" in call("stats", "inspect", other)
    assert "no label is in it" in " ".join(call("stats", "inspect", other).split())
    assert {p.name for p in tmp_path.iterdir()} == {"plain.st", "other.st"}


@pytest.mark.parametrize(
    ("change", "error", "word"),
    [
        (["--form", "txt"], RecipeError, "did you mean 'text'"),
        (["--template", "{text}"], RecipeError, "add --form text"),
        (["--form", "text", "--text-column", "words"], RecipeError, "rename the columns"),
        (["--form", "text", "--template", "Say:"], OrthomergeError, r"has no \{text\}"),
        (["minilm", "--form", "text"], OrthomergeError, "writes no text"),
        (["--form", "text", "--max-length", "3"], OrthomergeError, "no room for a text"),
    ],
)
def test_a_mistake_is_said_and_writes_nothing(made, tmp_path, change, error, word):
    folder, base, kind = made
    with pytest.raises(error, match=word):
        model, *change = change if not change[0].startswith("-") else [base, *change]
        call("stats", model, "--data", folder / "a.jsonl", "--targets", TARGETS[kind],
             "--output", tmp_path / "x", *change)  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_a_start_is_of_the_kind_and_the_layers_that_its_statistics_are_for(made, tmp_path):
    folder, base, kind = made
    length = ("--max-length", 40)
    said = call("stats", base, "--data", folder / "b.jsonl", *WORDS, *length, "--samples", 10,
                "--output", tmp_path / "b.st", "--json")  # fmt: skip
    meta = json.loads(said)
    default = {"CAUSAL_LM": ["q_proj", "v_proj"], "SEQ_2_SEQ_LM": ["q", "v"]}[kind]
    assert meta["target_modules"] == default and meta["max_length"] == 40
    call("init", base, "--others", tmp_path / "b.st", "--rank", 2, "--output", tmp_path / "start")
    start = read_adapter(tmp_path / "start")
    assert start.config["task_type"] == kind
    assert sorted(start.config["target_modules"]) == default
    train = ("train", tmp_path / "start", "--train-file", folder / "a.jsonl", "--epochs", 0.1)
    said = call(*train, *WORDS, *length, "--output", tmp_path / "same")
    assert "note:" not in said
    said = call(*train, "--output", tmp_path / "other")
    assert "collected with another prompt and at 40 tokens, not 128" in said


def test_all_linear_is_every_layer_that_peft_takes(made, tmp_path):
    folder, base, kind = made
    call("stats", base, "--data", folder / "b.jsonl", *WORDS, "--targets", "all-linear",
         "--samples", 10, "--output", tmp_path / "b.st")  # fmt: skip
    call("init", base, "--others", tmp_path / "b.st", "--rank", 2, "--output", tmp_path / "start")
    from peft import LoraConfig, get_peft_model

    model = load_language_model(str(base))
    theirs = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type=kind))
    names = {n for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    ours = read_adapter(tmp_path / "start").layers
    assert {n.removeprefix("base_model.model.") for n in names} == set(ours)
