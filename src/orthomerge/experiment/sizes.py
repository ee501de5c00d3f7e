"""How large a base model is and what a job on it takes: from its shapes, no weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from orthomerge.experiment.jobs import KINDS
from orthomerge.experiment.recipe import Recipe
from orthomerge.models.modules import is_transposed
from orthomerge.statistics import target_layers

# What Python, PyTorch and Transformers take before any model; measured at 0.56 GB.
PROCESS = 700_000_000
# Rows of one evaluation batch, as `Evaluator` takes them, and texts of one batch of statistics.
EVALUATION_BATCH = 64
STATISTICS_BATCH = 16
_WIDTH = ("hidden_size", "d_model", "n_embd")


class Need(NamedTuple):
    """What one job takes: processors, GPUs, bytes of memory at its peak."""

    cpus: float
    gpus: float
    memory: int


@dataclass(frozen=True)
class BaseSize:
    """The shapes of a base model that memory, disk and time follow from.

    `multiplied` are the parameters that a token is multiplied with: all but the embeddings, which
    are looked up. In words that counts the output layer, of `output` parameters, and `predicted` is
    the vocabulary of a decoder, whose training predicts every token. `layers` are the adapted
    layers as `(d_out, d_in)`, `inputs` the widths of their distinct inputs: layers of one module
    that read one width share theirs, as q, k and v do.
    """

    parameters: int
    multiplied: int
    bytes_each: int
    width: int
    depth: int
    heads: int
    layers: tuple[tuple[int, int], ...]
    inputs: tuple[int, ...]
    output: int = 0
    predicted: int = 0

    @property
    def weights(self) -> int:
        """Bytes of the base model's weights."""
        return self.parameters * self.bytes_each

    def adapter(self, rank: int) -> int:
        """Parameters of one adapter, its head left out."""
        return sum(rank * (d_out + d_in) for d_out, d_in in self.layers)

    def updates(self) -> int:
        """Entries of the adapted layers, hence of a dense update."""
        return sum(d_out * d_in for d_out, d_in in self.layers)

    def moments(self) -> int:
        """Bytes of one task's second moments, full and in float64."""
        return sum(8 * d * d for d in self.inputs)

    def logits(self, rows: int, length: int) -> int:
        """Bytes of what a training predicts, in its own type and, with its gradient, in float32."""
        return rows * length * self.predicted * (self.bytes_each + 8)

    def activations(self, rows: int, length: int) -> int:
        """Bytes that a forward pass keeps for the backward pass.

        `rows · length · depth · width · (34 + 5 · heads · length / width)` in 16 bits, twice that
        in 32 (Korthikanti et al., arXiv 2205.05198).
        """
        each = 34 + 5 * self.heads * length / self.width
        scale = self.bytes_each / 2
        return int(rows * length * self.depth * self.width * each * scale)


def base_size(skeleton: Any, targets: Sequence[str], *, in_words: bool = False) -> BaseSize:
    """The sizes of a model whose weights may be on the meta device, `in_words` with its output.

    Raises:
        UnknownNameError: a target matches no layer.
    """
    config = skeleton.config
    layers = target_layers(skeleton, targets)
    shapes: list[tuple[int, int]] = []
    inputs: dict[tuple[str, int], int] = {}
    for name, layer in layers.items():
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        d_out, d_in = weight.shape[::-1] if is_transposed(layer) else weight.shape
        shapes.append((d_out, d_in))
        inputs[(name.rpartition(".")[0], d_in)] = d_in
    dtype = getattr(config, "dtype", None)
    width, whole = _first(config, *_WIDTH), sum(p.numel() for p in skeleton.parameters())
    output = config.vocab_size * width if in_words else 0
    decoder = in_words and not config.is_encoder_decoder
    return BaseSize(
        parameters=whole + (0 if getattr(config, "tie_word_embeddings", True) else output),
        multiplied=whole - _looked_up(skeleton) + output,
        bytes_each=dtype.itemsize if isinstance(dtype, torch.dtype) else 4,
        width=width,
        depth=_first(config, "num_hidden_layers", "num_layers", "n_layer"),
        heads=_first(config, "num_attention_heads", "num_heads", "n_head"),
        layers=tuple(shapes),
        inputs=tuple(inputs.values()),
        output=output,
        predicted=config.vocab_size if decoder else 0,
    )


def _looked_up(skeleton: Any) -> int:
    """Parameters of embeddings; one that several modules share counts once, as it does above."""
    tables = {m.weight for m in skeleton.modules() if isinstance(m, nn.Embedding)}
    return sum(table.numel() for table in tables)


def _first(config: Any, *names: str) -> int:
    return int(next((v for n in names if (v := getattr(config, n, None)) is not None), 1))


def widest_targets(recipe: Recipe) -> list[str]:
    """The targets of all arms together: what holds for them holds for each."""
    shapes = [recipe.adapter_of(arm) for arm in recipe.arms]
    return list(dict.fromkeys(target for shape in shapes for target in shape.targets))


def largest_rank(recipe: Recipe) -> int:
    """The largest rank of an arm."""
    return max(recipe.adapter_of(arm).rank for arm in recipe.arms)


def estimate_needs(recipe: Recipe, size: BaseSize) -> dict[str, Need]:
    """What a job of each kind takes: the recipe's word where it says it, else an estimate."""
    estimated = _memory(recipe, size)
    found: dict[str, Need] = {}
    for kind in KINDS:
        said = recipe.resources.get(kind)
        memory = said.memory if said and said.memory is not None else PROCESS + estimated[kind]
        found[kind] = Need(said.cpus if said else 1, said.gpus if said else 0, memory)
    return found


def _memory(recipe: Recipe, size: BaseSize) -> dict[str, int]:
    """Peak bytes of each kind above the process itself.

    The base, activations, and what the kind holds beside them: moments for statistics and starts
    (an eigendecomposition takes three of its matrices), gradients and AdamW's two moments for a
    training, all adapters and one dense update for a merge.
    """
    length, tasks = recipe.data.max_length, len(recipe.tasks)
    adapter = size.adapter(largest_rank(recipe))
    largest = max(size.inputs, default=0)
    rows = recipe.training.batch_size // recipe.training.accumulate
    forward = size.activations(EVALUATION_BATCH, length) // max(size.depth, 1)
    scoring = size.weights + forward + size.updates() * size.bytes_each
    return {
        "stats": size.weights
        + size.activations(STATISTICS_BATCH, length) // max(size.depth, 1)
        + size.moments(),
        "start": size.weights + tasks * size.moments() + 3 * 8 * largest * largest,
        "train": size.weights
        + size.activations(rows, length)
        + size.logits(rows, length)
        + 16 * adapter,
        "fisher": size.weights + size.activations(1, length) + 12 * size.updates(),
        "eval": scoring + 4 * adapter,
        "merge": scoring + 4 * adapter * tasks + 4 * size.updates() + tasks * size.moments(),
    }
