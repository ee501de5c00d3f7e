"""The penalty: its value, its two gradients, what it refuses, and what a trainer makes of it."""

from __future__ import annotations

import pytest
import torch
from conftest import make_texts, tiny_bert
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from orthomerge.adapters import (
    OsrmConfig,
    Penalty,
    lora_layers,
    new_lora,
    penalty_charges,
    read_penalty,
)
from orthomerge.adapters.penalty import write_penalty
from orthomerge.errors import AdapterError, RecipeError, StatisticsError
from orthomerge.moments import Representation, combine
from orthomerge.statistics import batches, collect_statistics
from orthomerge.training.callbacks import OsrmCallback, PenaltyCallback

TARGETS = ["query", "value", "output.dense"]
FORMS = {
    "full": Representation("full"),
    "rows": Representation("rows"),
    "sketch": Representation("sketch", size=12),
}


@pytest.fixture(scope="module")
def collected(tiny_tokenizer):
    """Statistics of four tasks in every form, and published ones."""

    def collect(form, seed):
        return collect_statistics(
            tiny_bert(),
            batches([(t, None) for t in make_texts(4, 10 + seed)], tiny_tokenizer),
            TARGETS,
            granularity="token",
            representation=FORMS[form],
        )

    found = {form: [collect(form, seed) for seed in range(4)] for form in FORMS}
    found["published"] = [s.published(6, noise=0.01, seed=i) for i, s in enumerate(found["full"])]
    return found


def lora(dtype=torch.float64, seed=0, **changes):
    """An adapter of random factors, as one is amid its training."""
    options = {"targets": TARGETS, "rank": 4, "alpha": 8, "task_type": "SEQ_CLS", **changes}
    model = new_lora(tiny_bert().to(dtype), seed=seed, **options)
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        for part in (layer.lora_A["default"], layer.lora_B["default"]):
            part.to(dtype)
            drawn = torch.randn(part.weight.shape, generator=generator, dtype=torch.float64)
            part.weight.data.copy_(0.1 * drawn)
    return model


def dense(model, others, weights=None, extra=lambda other: 0.0):
    """The oracle: the mean of P, every update and moment dense, in float64."""
    total = []
    for name, layer in lora_layers(model).items():
        S = combine([s.moment(name) for s in others], weights).matrix
        W = layer.get_base_layer().weight.detach().double()
        update = layer.get_delta_weight("default").detach().double()
        charged = S + extra(S) * torch.eye(len(S), dtype=torch.float64)
        total.append(torch.trace(update @ charged @ update.T) / torch.trace(W @ S @ W.T))
    return torch.stack(total).mean()


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("shape", ["plain", "rslora", "ranks"])
@pytest.mark.parametrize("form", [*FORMS, "published"])
def test_value_and_both_gradients(collected, form, shape):
    ranks = {"encoder.layer.0.attention.self.query": 2} if shape == "ranks" else None
    model = lora(rslora=shape == "rslora", ranks=ranks)
    others = collected[form][1:]
    config = OsrmConfig(
        solver="default", constraint="penalty", strength=7.0, weights=(1.0, 2.0, 0.5)
    )
    penalty = Penalty(model, penalty_charges(model, others, None, config))
    torch.testing.assert_close(
        penalty.value(), dense(model, others, config.weights), rtol=1e-9, atol=0
    )
    loss = penalty()
    torch.testing.assert_close(loss.detach(), 7.0 * penalty.value(), rtol=1e-12, atol=0)
    loss.backward()
    wanted = gradients(model)
    assert set(wanted) == {n for n, _ in model.named_parameters() if ".lora_" in n}
    model.zero_grad()
    told = penalty.add_gradients()
    torch.testing.assert_close(told, penalty.value(), rtol=1e-12, atol=0)
    for name, found in gradients(model).items():
        torch.testing.assert_close(found, wanted[name], rtol=1e-6, atol=1e-15)
    # Twice as much scale adds twice as much to what is there.
    penalty.add_gradients(2.0)
    for name, found in gradients(model).items():
        torch.testing.assert_close(found, 3 * wanted[name], rtol=1e-6, atol=1e-15)


def test_finite_differences(collected):
    model = lora(seed=3)
    config = OsrmConfig(solver="default", constraint="penalty")
    penalty = Penalty(model, penalty_charges(model, collected["full"][1:], None, config))
    penalty.add_gradients()
    generator = torch.Generator().manual_seed(5)
    for parameter in penalty.parameters[:6]:
        way = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * 1e-5 * way)
                ends.append(float(penalty()))
                parameter.sub_(sign * 1e-5 * way)
        slope = (ends[0] - ends[1]) / 2e-5
        assert slope == pytest.approx(float((parameter.grad * way).sum()), rel=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_controls_have_the_trace_of_the_others(collected, form):
    model, (own, *others) = lora(), collected[form]

    def charges(**changes):
        config = OsrmConfig(solver="default", constraint="penalty", **changes)
        return penalty_charges(model, others, own, config)

    plain = charges()
    for name in ("isotropic", "pooled", "random"):
        for layer, charge in charges(penalty_moment=name).layers.items():
            other = plain.layers[layer].moment
            found = charge.ridge * other.dim + (charge.moment.trace if charge.moment else 0.0)
            assert found == pytest.approx(other.trace, rel=1e-9)
            assert charge.base == plain.layers[layer].base
    identity = Penalty(model, charges(penalty_moment="isotropic")).value()
    mixed = Penalty(model, charges(isotropic_share=0.5)).value()
    torch.testing.assert_close(mixed, Penalty(model, plain).value() + 0.5 * identity)
    torch.testing.assert_close(
        mixed, dense(model, others, extra=lambda S: 0.5 * S.trace() / len(S))
    )
    # Turned directions have the same eigenvalues, and another seed turns them elsewhere.
    layer = next(iter(plain.layers))
    one, two = (charges(penalty_moment="random", seed=s).layers[layer].moment for s in (0, 1))
    for turned in (one, two):
        torch.testing.assert_close(
            torch.linalg.eigvalsh(turned.matrix),
            torch.linalg.eigvalsh(plain.layers[layer].moment.matrix),
            atol=1e-9, rtol=1e-9,
        )  # fmt: skip
    assert not torch.allclose(one.matrix, two.matrix)


def test_layers_of_one_input_share_one_moment(collected):
    model = lora()
    config = OsrmConfig(solver="default", constraint="penalty")
    charges = penalty_charges(model, collected["rows"][1:], None, config).layers
    of = {name.rsplit(".", 1)[-1]: charge.moment for name, charge in charges.items()}
    assert of["query"] is of["value"]
    assert of["query"] is not of["dense"]


@pytest.mark.parametrize("form", [*FORMS, "published"])
def test_a_file_gives_the_same_penalty(collected, form, tmp_path):
    model = lora(torch.float32)
    config = OsrmConfig(solver="default", constraint="penalty", strength=3, isotropic_share=0.1)
    charges = penalty_charges(model, collected[form][1:], None, config)
    write_penalty(tmp_path, charges)
    read = read_penalty(tmp_path)
    assert read.strength == 3
    torch.testing.assert_close(
        Penalty(model, read).value(), Penalty(model, charges).value(), rtol=1e-5, atol=0
    )
    (tmp_path / "penalty.safetensors").write_bytes(b"no")
    with pytest.raises(AdapterError, match="cannot be read"):
        read_penalty(tmp_path)
    with pytest.raises(AdapterError, match="--constraint penalty"):
        read_penalty(tmp_path / "elsewhere")


def test_what_it_refuses(collected):
    config = OsrmConfig(solver="default", constraint="penalty")

    def wrapped(**changes):
        options = {"r": 4, "target_modules": ["query"], **changes}
        return get_peft_model(tiny_bert(), LoraConfig(**options))

    for changes, said in (
        ({"use_dora": True}, "Dora"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"target_modules": ["query", "word_embeddings"]}, "embedding"),
        ({"lora_bias": True}, "lora_bias"),
    ):
        with pytest.raises(AdapterError, match=said):
            penalty_charges(wrapped(**changes), collected["full"][1:], None, config)
    with pytest.raises(StatisticsError, match="at least one other"):
        penalty_charges(wrapped(), [], None, config)
    with pytest.raises(StatisticsError, match="own"):
        pooled = OsrmConfig(constraint="penalty", penalty_moment="pooled")
        penalty_charges(wrapped(), collected["full"][1:], None, pooled)
    charges = penalty_charges(wrapped(), collected["full"][1:], None, config)
    with pytest.raises(AdapterError, match="nothing says"):
        Penalty(wrapped(target_modules=["query", "value"]), charges)
    for changes in ({"strength": -1}, {"penalty_moment": "other"}, {"isotropic_share": -0.1}):
        with pytest.raises(RecipeError):
            OsrmConfig(constraint="penalty", **changes)


class Steps(TrainerCallback):
    """The gradient that the optimizer steps along."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, *, model, **kwargs):
        self.seen.append(gradients(model))


def in_trainer(model, callbacks, folder, **settings):
    generator = torch.Generator().manual_seed(1)
    rows = [
        {"input_ids": torch.randint(5, 30, (6,), generator=generator).tolist(), "labels": i % 2}
        for i in range(10)
    ]
    arguments = {
        "output_dir": str(folder), "per_device_train_batch_size": 2, "max_steps": 4,
        "learning_rate": 1e-3, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
        "use_cpu": True, "logging_steps": 2, "lr_scheduler_type": "constant", "optim": "sgd",
        **settings,
    }  # fmt: skip
    trainer = Trainer(
        model=model, args=TrainingArguments(**arguments), train_dataset=rows, callbacks=callbacks
    )
    trainer.model_accepts_loss_kwargs = False  # BERT's loss is a mean: let the Trainer divide it
    trainer.train()
    return trainer


class InTheLoss(Trainer):
    """The oracle: the penalty in the loss itself, by autograd."""

    penalty: Penalty

    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs) + self.penalty()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("clip", [0.0, 1e-2, 1e3])
def test_a_trainer_steps_along_the_gradient_of_the_whole_loss(
    collected, tmp_path, accumulate, clip, monkeypatch
):
    config = OsrmConfig(solver="default", constraint="penalty", strength=5.0)
    settings = {"max_grad_norm": clip, "gradient_accumulation_steps": accumulate}
    steps = Steps()
    model = lora(torch.float32)
    holds = OsrmCallback(model, collected["full"][1:], config=config)
    trained = in_trainer(model, [holds, steps], tmp_path, **settings)

    plain, wanted = lora(torch.float32), Steps()
    InTheLoss.penalty = Penalty(plain, penalty_charges(plain, collected["full"][1:], None, config))
    monkeypatch.setitem(globals(), "Trainer", InTheLoss)
    in_trainer(plain, [wanted], tmp_path, **settings)
    assert len(steps.seen) == len(wanted.seen) == 4
    for one, other in zip(steps.seen, wanted.seen, strict=True):
        for name in one:
            assert (one[name] - other[name]).norm() <= 1e-4 * other[name].norm()
    logged = [entry for entry in trained.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logged] == [2, 4]
    assert holds.penalty is not None
    assert [(e["step"], e["penalty"]) for e in logged] == holds.penalty.history


def test_a_trainer_that_clears_the_gradients_late_is_refused(collected, tmp_path, monkeypatch):
    class Clears(Trainer):
        def training_step(self, model, *args, **kwargs):
            model.zero_grad()
            return super().training_step(model, *args, **kwargs)

    monkeypatch.setitem(globals(), "Trainer", Clears)
    model = lora(torch.float32)
    config = OsrmConfig(solver="default", constraint="penalty")
    holds = OsrmCallback(model, collected["full"][1:], config=config)
    with pytest.raises(AdapterError, match="clears the gradients"):
        in_trainer(model, [holds], tmp_path)


def test_a_scaler_scales_the_penalty_too(collected):
    class Scaled:
        class scaler:
            @staticmethod
            def get_scale():
                return 1024.0

    model = lora()
    config = OsrmConfig(solver="default", constraint="penalty")
    penalty = Penalty(model, penalty_charges(model, collected["full"][1:], None, config))
    penalty.add_gradients()
    wanted = gradients(model)
    model.zero_grad()
    PenaltyCallback(penalty).on_step_begin(None, None, None, optimizer=Scaled())
    for name, found in gradients(model).items():
        torch.testing.assert_close(found, 1024 * wanted[name])


@pytest.mark.parametrize("held", ["A", "B"])
def test_what_is_held_gets_no_gradient(collected, held):
    model = lora()
    for layer in lora_layers(model).values():
        (layer.lora_A if held == "A" else layer.lora_B)["default"].weight.requires_grad_(False)
    config = OsrmConfig(solver="default", constraint="penalty")
    penalty = Penalty(model, penalty_charges(model, collected["full"][1:], None, config))
    penalty.add_gradients()
    assert all(f"lora_{held}" not in name for name in gradients(model))
