"""How large a base model is, from its shapes: what the estimates of steps are made of.

Time is counted in operations: a pass of `n` tokens through `P` parameters, embeddings left out,
takes `2 P n`, a LoRA training step twice that, since the base has no gradient. Texts count at their
longest (`max_length`), so hours are rather too many than too few.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from huggingface_hub import hf_hub_download  # pyright: ignore[reportUnknownVariableType]
from torch import nn
from transformers import AutoConfig, AutoModel

from orthomerge.errors import RecipeError
from orthomerge.io.files import is_folder, local
from orthomerge.models.assets import ResolvedModel
from orthomerge.models.hub import hub_reason
from orthomerge.models.loading import load_meta_model, quiet
from orthomerge.statistics import layer_shape, target_layers

# What Python, PyTorch and Transformers take before any model; measured at 0.56 GB.
PROCESS = 700_000_000
# Rows of one evaluation batch, as `Evaluator` takes them, and texts of one batch of statistics.
EVALUATION_BATCH = 64
STATISTICS_BATCH = 16
# Bytes per trained parameter: itself, its gradient and AdamW's two moments, in float32.
TRAINING_BYTES = 16
# Operations of an eigendecomposition of a d×d matrix are about this times d³.
DECOMPOSITION = 9
# Operations of merging methods for each entry of an update and each adapter, roughly.
MERGING = 20
_WIDTH = ("hidden_size", "d_model", "n_embd")


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

    def adapter(self, rank: int | None) -> int:
        """Parameters of one adapter of a rank, None for full rank; its head is left out."""
        ranks = [min(shape) if rank is None else min(rank, *shape) for shape in self.layers]
        return sum(r * sum(shape) for r, shape in zip(ranks, self.layers, strict=True))

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


def base_size(meta_model: Any, targets: Sequence[str], *, in_words: bool = False) -> BaseSize:
    """The sizes of a model whose weights may be on the meta device, `in_words` with its output.

    Raises:
        UnknownNameError: a target matches no layer.
    """
    config = meta_model.config
    layers = target_layers(meta_model, targets)
    shapes: list[tuple[int, int]] = []
    inputs: dict[tuple[str, int], int] = {}
    for name, layer in layers.items():
        d_out, d_in = layer_shape(layer)
        shapes.append((d_out, d_in))
        inputs[(name.rpartition(".")[0], d_in)] = d_in
    dtype = getattr(config, "dtype", None)
    width, whole = _first(config, *_WIDTH), sum(p.numel() for p in meta_model.parameters())
    output = config.vocab_size * width if in_words else 0
    decoder = in_words and not config.is_encoder_decoder
    return BaseSize(
        parameters=whole + (0 if getattr(config, "tie_word_embeddings", True) else output),
        multiplied=whole - _looked_up(meta_model) + output,
        bytes_each=dtype.itemsize if isinstance(dtype, torch.dtype) else 4,
        width=width,
        depth=_first(config, "num_hidden_layers", "num_layers", "n_layer"),
        heads=_first(config, "num_attention_heads", "num_heads", "n_head"),
        layers=tuple(shapes),
        inputs=tuple(inputs.values()),
        output=output,
        predicted=config.vocab_size if decoder else 0,
    )


def _looked_up(meta_model: Any) -> int:
    """Parameters of embeddings; one that several modules share counts once, as it does above."""
    tables = {m.weight for m in meta_model.modules() if isinstance(m, nn.Embedding)}
    return sum(table.numel() for table in tables)


def _first(config: Any, *names: str) -> int:
    return int(next((v for n in names if (v := getattr(config, n, None)) is not None), 1))


def count_rows(rows: int | str) -> int:
    """Rows of a split; where all are asked for, as many as the largest task of GLUE has (MNLI)."""
    return rows if isinstance(rows, int) else 392_702


_LLAMA = {"model_type": "llama", "vocab_size": 128256, "num_attention_heads": 32,
          "num_key_value_heads": 8, "dtype": "bfloat16"}  # fmt: skip

# The published dimensions of models that plans are often made for, by the end of their id.
KNOWN: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {**_LLAMA, "hidden_size": 2048, "num_hidden_layers": 16,
                     "intermediate_size": 8192, "tie_word_embeddings": True},
    "llama-3.2-3b": {**_LLAMA, "hidden_size": 3072, "num_hidden_layers": 28,
                     "intermediate_size": 8192, "num_attention_heads": 24,
                     "tie_word_embeddings": True},
    "llama-3.1-8b": {**_LLAMA, "hidden_size": 4096, "num_hidden_layers": 32,
                     "intermediate_size": 14336},
    "roberta-large": {"model_type": "roberta", "vocab_size": 50265, "hidden_size": 1024,
                      "num_hidden_layers": 24, "num_attention_heads": 16,
                      "intermediate_size": 4096, "max_position_embeddings": 514,
                      "type_vocab_size": 1},
    "all-minilm-l6-v2": {"model_type": "bert", "vocab_size": 30522, "hidden_size": 384,
                         "num_hidden_layers": 6, "num_attention_heads": 12,
                         "intermediate_size": 1536},
    "all-mpnet-base-v2": {"model_type": "mpnet", "vocab_size": 30527, "hidden_size": 768,
                          "num_hidden_layers": 12, "num_attention_heads": 12,
                          "intermediate_size": 3072},
    "smollm2-135m-instruct": {"model_type": "llama", "vocab_size": 49152, "hidden_size": 576,
                              "num_hidden_layers": 30, "num_attention_heads": 9,
                              "num_key_value_heads": 3, "intermediate_size": 1536,
                              "tie_word_embeddings": True},
    "t5-large": {"model_type": "t5", "vocab_size": 32128, "d_model": 1024, "d_kv": 64,
                 "d_ff": 4096, "num_layers": 24, "num_heads": 16},
}  # fmt: skip
KNOWN["mpnet-base"] = KNOWN["all-mpnet-base-v2"]
KNOWN["smollm2-135m"] = KNOWN["smollm2-135m-instruct"]
KNOWN["minilm"] = KNOWN["all-minilm-l6-v2"]
KNOWN["llama-3-8b"] = KNOWN["meta-llama-3-8b"] = KNOWN["llama-3.1-8b"]


def shapes_of(base: str, found: ResolvedModel | None) -> tuple[Any, str]:
    """The model called `base` without its weights, and where its shapes are from.

    The config of the model that was `found` here, or of a folder, then dimensions known here, then
    the hub's config, which is read and not kept.

    Raises:
        RecipeError: no place knows the model.
    """
    if found is not None or is_folder(base):
        return load_meta_model(found.path_or_id if found else str(local(base))), "its config"
    known = KNOWN.get(base.rsplit("/", 1)[-1].lower())
    if known is not None:
        config = AutoConfig.for_model(**known)
        with quiet(), torch.device("meta"):
            return cast(Any, AutoModel).from_config(config), "published dimensions"
    try:
        with tempfile.TemporaryDirectory() as folder:
            hf_hub_download(base, "config.json", local_dir=folder)
            return load_meta_model(folder), "the hub's config"
    # The client raises its transport's errors, its own and ValueErrors: each means no config.
    except Exception as problem:
        raise RecipeError(
            f"the shapes of '{base}' are not known here and {hub_reason(problem)}: name a folder "
            f"with its config.json as 'base', or one of {', '.join(KNOWN)}."
        ) from problem
