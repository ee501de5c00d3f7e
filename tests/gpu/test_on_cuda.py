"""What runs on a GPU gives what the CPU gives, and does run there."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import call, make_texts, tiny_bert, write_task
from small_adapters import make_adapter
from tiny_recipe import execute, make_recipe
from transformers import LlamaConfig, LlamaModel

from orthomerge.adapters import (
    OsrmConfig,
    Projection,
    convert_adapters,
    excluded_directions,
    initialize_osrm_weights,
    lora_layers,
    merge_adapters,
    new_lora,
    read_adapter,
)
from orthomerge.evaluation.classification import Evaluator
from orthomerge.experiment.executors import ProcessExecutor
from orthomerge.fisher import load_fisher
from orthomerge.merging import merge_layers
from orthomerge.models.loading import load_backbone, load_tokenizer
from orthomerge.moments import leave_one_out
from orthomerge.statistics import Statistics, collect_statistics
from orthomerge.subspace import get_solver, list_solvers
from orthomerge.tasks import get_task
from orthomerge.tuning import EntropySettings, minimise_entropy, read_inputs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TARGETS = ["query", "value", "dense"]


def on_cpu(work):
    """What `work` gives on the machine as if it had no GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        return work()


def random_batches(task: int, count: int = 3):
    g = torch.Generator().manual_seed(task)
    for _ in range(count):
        ids = torch.randint(5, 40, (6, 12), generator=g)
        mask = torch.ones_like(ids)
        mask[0, 7:] = 0
        yield {"input_ids": ids, "attention_mask": mask}


def both(task: int, count: int = 3, **how) -> tuple[Statistics, Statistics]:
    """A task's statistics from the same model on the GPU and on the CPU."""
    here = collect_statistics(tiny_bert(), random_batches(task, count), TARGETS, **how)
    there = collect_statistics(tiny_bert().cuda(), random_batches(task, count), TARGETS, **how)
    return there, here


def same(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert float(
        (a.detach().cpu().double() - b.detach().cpu().double()).norm()
    ) <= tolerance * float(b.detach().double().norm())


@pytest.mark.parametrize("granularity", ["token", "sample", "task_mean"])
def test_statistics(granularity, tmp_path):
    there, here = both(1, granularity=granularity)
    for layer in here.layers:
        assert there.second_moment(layer).device.type == "cuda"
        same(there.second_moment(layer), here.second_moment(layer))
    assert Statistics.load(there.save(tmp_path / "t.st")).meta.samples == here.meta.samples


def test_statistics_of_a_bfloat16_decoder_spread_by_a_device_map(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=24, max_position_embeddings=40, pad_token_id=0,
    )  # fmt: skip
    LlamaModel(config).to(torch.bfloat16).save_pretrained(tmp_path / "llama")
    targets = ["q_proj", "down_proj"]
    here = collect_statistics(load_backbone(str(tmp_path / "llama")), random_batches(3), targets)
    spread = {"embed_tokens": "cpu", "layers.0": "cpu", "layers.1": 0, "norm": 0, "rotary_emb": 0}
    for device_map in ("auto", spread):
        model = load_backbone(str(tmp_path / "llama"), device_map=device_map)
        there = collect_statistics(model, random_batches(3), targets)
        for layer in here.layers:
            same(there.second_moment(layer), here.second_moment(layer), 0.03)


@pytest.mark.parametrize("solver", list_solvers(), ids=lambda s: s.name)
def test_every_solver(solver):
    tasks = [both(t, count=1, granularity="sample") for t in range(3)]
    layer = next(iter(tasks[0][1].moments))
    found = []
    for place in (0, 1):
        moments = [pair[place].moments[layer] for pair in tasks]
        found.append(get_solver(solver.name)(leave_one_out(moments)[0], 4, own=moments[0], seed=5))
    there, here = found
    assert there.basis.device.type == "cuda"
    assert there.captured_other == pytest.approx(here.captured_other, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("constraint", ["init", "project"])
def test_a_start_and_what_holds_it(constraint):
    tasks = [both(t)[0] for t in range(3)]
    model = new_lora(
        tiny_bert().cuda(), targets=TARGETS, rank=4, alpha=8, task_type="SEQ_CLS", seed=1
    )
    config = OsrmConfig(solver="contrastive", constraint=constraint)
    chosen = initialize_osrm_weights(model, tasks[1:], tasks[0], config)
    for name, layer in lora_layers(model).items():
        same(layer.lora_A["default"].weight, chosen[name].basis, 1e-6)
    if constraint == "init":
        return
    held = Projection(model, excluded_directions(model, tasks[1:], tasks[0], config))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    handle = held.attach(optimizer)
    before = {n: m.lora_A["default"].weight.clone() for n, m in lora_layers(model).items()}
    for batch in random_batches(7):
        labels = torch.tensor([0, 1, 0, 1, 0, 1], device="cuda")
        model(**{k: v.cuda() for k, v in batch.items()}, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    handle.remove()
    assert held.violation() < 1e-6
    assert any(
        not torch.equal(before[n], m.lora_A["default"].weight)
        for n, m in lora_layers(model).items()
    )


@pytest.fixture(scope="module")
def files(tiny_base, tmp_path_factory):
    """Two adapters with their tasks, and texts."""
    folder = tmp_path_factory.mktemp("gpu")
    for name, seed in (("a", 1), ("b", 2)):
        make_adapter(folder / name, tiny_base, seed)
        write_task(folder / f"{name}.jsonl", seed=seed + 5)
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in make_texts(20)))
    return folder


def test_the_command_collects_on_the_gpu(files, tiny_base, tmp_path):
    def collect(name):
        call("stats", tiny_base, "--data", files / "texts.jsonl", "-o", tmp_path / name)
        return Statistics.load(tmp_path / name)

    torch.cuda.reset_peak_memory_stats()
    idle = torch.cuda.max_memory_allocated()
    there = collect("there")
    assert torch.cuda.max_memory_allocated() > idle
    here = on_cpu(lambda: collect("here"))
    for layer in here.layers:
        same(there.second_moment(layer), here.second_moment(layer))


def test_layers_side_by_side_on_devices(files):
    adapters = [read_adapter(files / n).layers for n in "ab"]
    here = merge_layers(adapters, method="ties")
    there = merge_layers(adapters, method="ties", devices=["cuda:0", "cpu"])
    for layer in here.layers:
        assert there.dense(layer).device.type == "cpu"
        same(there.dense(layer), here.dense(layer))
    call("merge", files / "a", files / "b", "--method", "tsv_m", "--device", "cuda:0",
         "-o", files / "merged")  # fmt: skip
    assert read_adapter(files / "merged").layers


def test_statistics_that_were_not_written_go_with_adapters_that_are_read(files, tmp_path):
    adapters = [read_adapter(files / n) for n in "ab"]
    there, here = zip(*(both(t) for t in range(2)), strict=True)
    for stats, name in ((there, "there"), (here, "here")):
        convert_adapters(adapters, tmp_path / name, statistics=stats)
        merge_adapters(adapters, method="regmean", statistics=stats, output=tmp_path / f"m{name}")
    for one, other in (("there/a", "here/a"), ("mthere", "mhere")):
        found, expected = read_adapter(tmp_path / one).layers, read_adapter(tmp_path / other).layers
        for layer in expected:
            same(found[layer].delta(), expected[layer].delta(), 1e-3)


def test_scores_and_fisher_information(files, tiny_base, tmp_path):
    adapter, rows = read_adapter(files / "a"), get_task(str(files / "a.jsonl")).pools()["test"]

    def scores():
        evaluator = Evaluator(str(tiny_base), load_tokenizer(str(tiny_base)))
        return evaluator.predict(
            rows, adapter.layers, adapter.modules, num_labels=2, regression=False
        )

    def fisher(name):
        call(
            "fisher",
            files / "a",
            "--task",
            files / "a.jsonl",
            "--samples",
            8,
            "-o",
            tmp_path / name,
        )
        return load_fisher(tmp_path / name)

    assert list(scores()) == list(on_cpu(scores))
    there, here = fisher("there"), on_cpu(lambda: fisher("here"))
    for layer in here:
        same(there[layer], here[layer], 1e-3)


def test_entropy_descends_alike(files):
    inputs = read_inputs(
        [files / n for n in "ab"], [str(files / f"{n}.jsonl") for n in "ab"], rows=8
    )
    settings = EntropySettings(steps=5)
    there = minimise_entropy(inputs, settings=settings)
    here = on_cpu(lambda: minimise_entropy(inputs, settings=settings))
    assert there.weights == pytest.approx(here.weights, rel=1e-3)
    assert there.value == pytest.approx(here.value, rel=1e-3)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_whole_run(tiny_base, tmp_path, jobs):
    values = make_recipe(tmp_path / "files", tiny_base)
    rows = execute(values, tmp_path / "run", executor=ProcessExecutor(jobs) if jobs > 1 else None)
    assert rows and all(math.isfinite(row.value) for row in rows)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["peak_gpu_memory"]["train"] > 0
