"""Statistics of experts: what each reads of the tokens that the router sent to it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_text import tiny_language_tokenizer
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "interop" / "zoo"))

from mixtures import BOTH, EVERY, EXPERTS, INSIDE, MIXTURES, PRESENT_LAYOUT, WIDE, mixtral

from orthomerge import OsrmCallback, interference
from orthomerge.adapters import (
    OsrmConfig,
    Penalty,
    initialize_osrm_weights,
    load_trainable,
    lora_layers,
    merge_adapters,
    penalty_charges,
    read_adapter,
    save_start,
    start_adapter,
)
from orthomerge.cli import app
from orthomerge.errors import AdapterError, OrthomergeError, UnknownNameError
from orthomerge.moments import (
    MeanMoment,
    Representation,
    RowMoment,
    SecondMoment,
    SketchMoment,
)
from orthomerge.statistics import Statistics, collect_statistics, target_layers
from orthomerge.subspace import list_solvers

pytestmark = PRESENT_LAYOUT
FIRST = "layers.0.mlp.experts.gate_up_proj.{}"
SECOND = "layers.0.mlp.experts.down_proj.{}"


def batch(seed=0, rows=4, length=6):
    ids = torch.randint(1, 40, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, 3:] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def routed(model, inputs):
    """The first mixture's hidden states, its router's choice and weights, and what it puts out."""
    seen = {}

    def keep(_module, args, output):
        seen.update(zip(("hidden", "index", "weights"), args, strict=True), output=output)

    handle = model.model.layers[0].mlp.experts.register_forward_hook(keep)
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return seen


@EVERY
def test_each_expert_reads_its_tokens(make):
    model, inputs = make(), batch()
    seen = routed(model, inputs)
    real = inputs["attention_mask"].reshape(-1).bool()
    found = collect_statistics(model, [inputs], BOTH)
    assert len(found.layers) == 2 * 2 * EXPERTS
    for expert in range(EXPERTS):
        rows = seen["hidden"][(seen["index"] == expert).any(-1) & real].double()
        moment = found.moment(FIRST.format(expert))
        assert moment.count == real.sum()
        torch.testing.assert_close(moment.matrix, rows.T @ rows / real.sum())


@EVERY
def test_an_experts_activations_make_its_output(make):
    """The outputs' energies by the moments of `down_proj`, against the module's own."""
    model, inputs = make(num_experts_per_tok=1), batch()
    experts = model.model.layers[0].mlp.experts
    with torch.no_grad():
        for name, tensor in experts.named_parameters():
            if name.endswith("bias"):
                tensor.normal_() if "gate_up" in name else tensor.zero_()
    seen = routed(model, inputs)
    real = inputs["attention_mask"].reshape(-1).bool()
    found = collect_statistics(model, [inputs], BOTH[1:])
    output = seen["output"] / seen["weights"]  # each token's one expert, without its weight
    for expert in range(EXPERTS):
        W = experts.down_proj[expert].detach().double()
        W = W.T if experts.is_transposed else W
        rows = output[(seen["index"] == expert).any(-1) & real].double()
        S = found.moment(SECOND.format(expert)).matrix
        torch.testing.assert_close(W @ S @ W.T, rows.T @ rows / real.sum(), atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("kind", ["full", "rows", "sketch"])
def test_batches_add_up(kind):
    model, one, two = mixtral(), batch(1), batch(2)
    held = Representation(kind, size=WIDE + INSIDE)
    both = collect_statistics(model, [one, two], BOTH, representation=held)
    whole = collect_statistics(model, [one, two], BOTH)
    summed = collect_statistics(model, [one], BOTH, representation=held) + collect_statistics(
        model, [two], BOTH, representation=held
    )
    for lead, moment in whole.moments.items():
        torch.testing.assert_close(both.moments[lead].matrix, moment.matrix)
        torch.testing.assert_close(summed.moments[lead].matrix, moment.matrix)


def test_means_count_tokens_of_others_as_zero():
    model, inputs = mixtral(), batch()
    seen, mask = routed(model, inputs), inputs["attention_mask"]
    sample = collect_statistics(model, [inputs], BOTH[:1], granularity="sample")
    mean = collect_statistics(model, [inputs], BOTH[:1], granularity="task_mean")
    for expert in range(EXPERTS):
        mine = (seen["index"] == expert).any(-1).reshape(mask.shape) & mask.bool()
        kept = seen["hidden"].reshape(*mask.shape, WIDE).double() * mine[..., None]
        rows = kept.sum(dim=1) / mask.sum(dim=1, keepdim=True)
        S = sample.moment(FIRST.format(expert)).matrix
        torch.testing.assert_close(S, rows.T @ rows / len(rows))
        m = kept.sum(dim=(0, 1)) / mask.sum()
        M = mean.moment(FIRST.format(expert)).matrix
        torch.testing.assert_close(M, torch.outer(m, m))


@pytest.mark.parametrize("new", [SecondMoment, RowMoment, SketchMoment, MeanMoment])
def test_zeros_are_rows_like_others(new):
    rows = torch.randn(5, 4, dtype=torch.float64)
    padded = torch.cat([rows, torch.zeros(3, 4, dtype=torch.float64)])
    told = new(4).update(rows).add_zeros(3)
    assert told.count == new(4).update(padded).count
    torch.testing.assert_close(told.matrix, new(4).update(padded).matrix)
    assert not new(4).add_zeros(3).matrix.any()
    again = new.restore(*new(4).add_zeros(3).state())
    assert again.trace == 0


def test_targets_name_linear_layers_first():
    model = MIXTURES["qwen2_moe"]()
    assert "layers.0.mlp.shared_expert.down_proj" in target_layers(model, ["down_proj"])
    assert len(target_layers(model, ["down_proj"])) == 2
    assert len(target_layers(model, ["experts.down_proj"])) == 2 * EXPERTS
    assert len(target_layers(mixtral(), ["q_proj", "down_proj"])) == 2 + 2 * EXPERTS
    with pytest.raises(UnknownNameError, match=r"experts\.gate_up_proj"):
        target_layers(mixtral(), ["gate_projj"])


def deaf(expert=2, **changes):
    """A mixture whose router never chooses one expert."""
    model = mixtral(num_experts_per_tok=1, **changes)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[expert] = 0
            layer.mlp.gate.weight[1 - expert % 2] = layer.mlp.gate.weight[0] * -1
    return model


def statistics_of(make=mixtral, seeds=(1, 2), folder=None, granularity="token"):
    targets = ["q_proj", *BOTH]
    found = [
        collect_statistics(make(), [batch(seed)], targets, granularity=granularity)
        for seed in seeds
    ]
    if folder is not None:
        found = [s.save(folder / f"{i}.stats.safetensors") for i, s in enumerate(found)]
    return found


def wrapped(make=mixtral, rank=2):
    config = LoraConfig(r=rank, target_modules=["q_proj"], target_parameters=BOTH, lora_alpha=4)
    return get_peft_model(make(), config)


@pytest.mark.parametrize("solver", [s.name for s in list_solvers()])
def test_a_start_by_every_solver(tmp_path, solver):
    files = statistics_of(deaf, (1, 2, 3), tmp_path, "sample")
    own, *others = (Statistics.load(p) for p in files)
    model, config = wrapped(deaf), OsrmConfig(solver=solver, granularity="sample")
    chosen = initialize_osrm_weights(model, others, own, config)
    layers = lora_layers(model)
    assert set(chosen) == set(layers)
    assert len(layers) == 2 * (1 + 2 * EXPERTS)
    for name, layer in layers.items():
        A = layer.lora_A["default"].weight.double()
        torch.testing.assert_close(A, chosen[name].basis.to(A), atol=1e-6, rtol=1e-5)
        assert not layer.lora_B["default"].weight.any()
    silent = chosen[FIRST.format(2)]
    assert silent.total_other == 0
    eye = torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(silent.basis.double() @ silent.basis.double().T, eye)
    save_start(model, tmp_path / "start")
    factors = read_adapter(tmp_path / "start").layers
    for name in (FIRST.format(1), SECOND.format(0)):
        torch.testing.assert_close(factors[f"model.{name}"].A.double(), chosen[name].basis)


def test_min_eigen_finds_what_no_token_of_the_others_reads():
    others = statistics_of(seeds=(1, 2))
    model = wrapped()
    chosen = initialize_osrm_weights(model, others)
    S = sum(s.moment(FIRST.format(0)).matrix for s in others) / 2
    A = chosen[FIRST.format(0)].basis.double()
    values = torch.linalg.eigvalsh(S)
    torch.testing.assert_close((A @ S @ A.T).trace(), values[:2].sum(), atol=1e-10, rtol=1e-6)


@EVERY
def test_the_penalty_of_experts(make):
    """Its value from dense updates, its gradient from autograd."""
    others = statistics_of(make)
    model = wrapped(make)
    for seed, (name, p) in enumerate(model.named_parameters()):
        if "lora_" in name:
            torch.manual_seed(seed)
            torch.nn.init.normal_(p, 0, 0.3)
    charges = penalty_charges(model, others, None, OsrmConfig.recommended())
    penalty = Penalty(model, charges)
    parts = []
    for name, layer in lora_layers(model).items():
        A, B = (f["default"].weight.double() for f in (layer.lora_A, layer.lora_B))
        S = sum(s.moment(name).matrix for s in others) / 2
        base = layer.base_weight if hasattr(layer, "base_weight") else layer.weight.detach()
        delta = layer.scaling["default"] * B @ A
        parts.append(((delta @ S @ delta.T).trace(), (base.double() @ S @ base.double().T).trace()))
    expected = sum(a / b for a, b in parts if b > 0) / len(parts)
    torch.testing.assert_close(penalty.value().double(), expected, atol=1e-8, rtol=1e-4)
    penalty().backward()
    auto = [p.grad.clone() for p in penalty.parameters]
    for p in penalty.parameters:
        p.grad = None
    penalty.add_gradients()
    for p, gradient in zip(penalty.parameters, auto, strict=True):
        torch.testing.assert_close(p.grad, gradient, atol=1e-5, rtol=1e-3)


def test_project_is_refused():
    own, *others = statistics_of(seeds=(1, 2, 3))
    with pytest.raises(AdapterError, match="expert"):
        start_adapter(wrapped(), others, own, OsrmConfig(constraint="project"))


def test_merges_by_statistics_and_a_diagnosis(tmp_path):
    stats = statistics_of(deaf, (1, 2), tmp_path)
    folders = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = wrapped(deaf)
        for name, p in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(p, 0, 0.3)
        model.save_pretrained(tmp_path / f"a{seed}")
        folders.append(tmp_path / f"a{seed}")
    read = [read_adapter(f).layers for f in folders]
    name, silent = f"model.{FIRST.format(0)}", f"model.{FIRST.format(2)}"
    for method in ("regmean", "osrm_aware"):
        merged = merge_adapters(folders, method=method, weights=1.0, statistics=stats)
        assert all(f.delta().isfinite().all() for f in merged.layers.values())
        mean = (read[0][silent].delta() + read[1][silent].delta()) / 2
        torch.testing.assert_close(merged.layers[silent].delta(), mean, atol=1e-5, rtol=1e-4)
    moments = [Statistics.load(s).moment(name) for s in stats]
    G = [0.9 * m.matrix + 0.1 * torch.diag(m.matrix.diagonal()) for m in moments]
    G = [g + 1e-2 * m.matrix.diagonal().mean() * torch.eye(WIDE).double()
         for g, m in zip(G, moments, strict=True)]  # fmt: skip
    merged = merge_adapters(folders, method="regmean", weights=1.0, statistics=stats)
    expected = sum(r[name].delta().double() @ g for r, g in zip(read, G, strict=True))
    expected = expected @ torch.linalg.inv(sum(G))
    torch.testing.assert_close(merged.layers[name].delta().double(), expected, atol=1e-4, rtol=1e-3)
    found = interference(folders, stats)
    assert torch.equal(found.layers[silent], torch.zeros(2, 2).double())
    assert found.matrix[0, 0] == 1


def test_the_command_line(tmp_path):

    base, tokenizer = tmp_path / "base", tiny_language_tokenizer()
    deaf(vocab_size=len(tokenizer)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    for name in "ab":
        texts = [json.dumps({"text": f"{name} word {i} of some {name} text"}) for i in range(8)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(texts))
        result = run("stats", base, "--data", tmp_path / f"{name}.jsonl", "--targets",
                     "q_proj,experts.gate_up_proj,experts.down_proj",
                     "-o", tmp_path / f"{name}.stats.safetensors")  # fmt: skip
        assert "reached by no token" in result
    run("init", base, "--others", tmp_path / "b.stats.safetensors", "--rank", 2,
        "--solver", "min_eigen", "--task-type", "CAUSAL_LM", "-o", tmp_path / "start")  # fmt: skip
    made = read_adapter(tmp_path / "start")
    assert sorted(made.config["target_parameters"]) == [
        "experts.down_proj",
        "experts.gate_up_proj",
    ]
    assert f"model.{SECOND.format(1)}" in made.layers
    said = run("init", base, "--others", tmp_path / "b.stats.safetensors", "--rank", 2,
               "--task-type", "CAUSAL_LM", "-o", tmp_path / "charged")  # fmt: skip
    assert "penalty" in said
    model = load_trainable(deaf(vocab_size=len(tokenizer)), tmp_path / "charged")
    penalty = OsrmCallback.from_start(model, tmp_path / "charged").penalty
    assert penalty is not None


def run(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if isinstance(result.exception, OrthomergeError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output
