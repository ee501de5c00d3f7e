"""Loading base models and tokenizers: quietly, safetensors only, heads drawn under a seed."""

from __future__ import annotations

import copy
import logging
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)
from transformers.utils import logging as hf_logging

from orthomerge.errors import AssetError, reason, unknown_name
from orthomerge.io.files import fingerprint

_log = logging.getLogger(__name__)

# Given explicitly: otherwise Transformers asks at the terminal whether to run what a folder brings.
_NO_CODE: dict[str, Any] = {"trust_remote_code": False}


@contextmanager
def quiet() -> Generator[None, None, None]:
    """Transformers without its load reports and bars, for the length of a block."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


@contextmanager
def _said_plainly(model_id: str) -> Generator[None, None, None]:
    try:
        with quiet():
            yield
    except (OSError, ValueError, KeyError, RuntimeError) as problem:
        raise AssetError(f"model '{model_id}' cannot be loaded: {reason(problem)}.") from problem


def load_backbone(path: str, *, device_map: str | dict[str, Any] | None = None) -> Any:
    """The model without a head, for statistics.

    `device_map` spreads a base too large for one device, as in Transformers: "auto", a device, or
    a device (or "cpu", "disk") for each module.

    Raises:
        AssetError: nothing loadable at `path`, or no such device.
    """
    with _said_plainly(path):
        return cast(Any, AutoModel).from_pretrained(
            path, use_safetensors=True, device_map=device_map, **_NO_CODE
        )


Precision = Literal["float32", "bf16"]
"""What a frozen base is held in: the type that it was loaded in, or bfloat16."""
PRECISIONS = get_args(Precision)


def check_precision(name: str) -> Precision:
    """The precision of that name.

    Raises:
        UnknownNameError: there is none.
    """
    if name not in PRECISIONS:
        raise unknown_name("precision", name, PRECISIONS)
    return cast(Precision, name)


def in_precision(model: Any, precision: str) -> Any:
    """The model with its backbone in bfloat16 where `precision` is "bf16"; its head in float32.

    For a base that is frozen, where the processor multiplies bfloat16 faster. Buffers stay as they
    are, as the frequencies of rotary positions.

    Raises:
        UnknownNameError: no such precision.
    """
    if check_precision(precision) == "float32":
        return model
    prefix = model.base_model_prefix
    for parameter in getattr(model, prefix, model).parameters():
        parameter.data = parameter.data.bfloat16()
    if hasattr(model, prefix):
        for name, head in model.named_children():
            if name != prefix and any(True for _ in head.parameters()):
                _take_any_type(head)
    return model


def _take_any_type(head: Any) -> None:
    """Let a head in float32 take what a backbone in bfloat16 gives."""
    tied = next(head.parameters()).dtype == torch.bfloat16  # with the embeddings, as most decoders
    if not tied:
        head.float()
        head.register_forward_pre_hook(_in_float32)


def _in_float32(head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.float() if x.is_floating_point() else x for x in inputs)


def load_config(path: str) -> Any:
    """The model's configuration.

    Raises:
        AssetError: none at `path` that Transformers knows.
    """
    with _said_plainly(path):
        return cast(Any, AutoConfig).from_pretrained(path, **_NO_CODE)


def load_meta_model(path: str) -> Any:
    """The model of `load_backbone` without its weights: shapes on the meta device, no memory.

    Raises:
        AssetError: no configuration at `path` that Transformers knows.
    """
    with _said_plainly(path), torch.device("meta"):
        config = cast(Any, AutoConfig).from_pretrained(path, **_NO_CODE)
        return cast(Any, AutoModel).from_config(config, **_NO_CODE)


def load_classifier(
    path: str,
    *,
    num_labels: int,
    regression: bool = False,
    seed: int = 0,
    name: str | None = None,
) -> Any:
    """The model with a sequence-classification head whose new weights are drawn under `seed`.

    `name` is what adapters made on it call their base; by default the path itself.

    Raises:
        AssetError: nothing loadable at `path`.
    """
    with _said_plainly(path), torch.random.fork_rng():
        torch.manual_seed(seed)
        model = cast(Any, AutoModelForSequenceClassification).from_pretrained(
            path,
            use_safetensors=True,
            **_NO_CODE,
            num_labels=num_labels,
            problem_type="regression" if regression else "single_label_classification",
        )
    return _called(model, name or path)


def preferred_device() -> torch.device:
    """The accelerator that PyTorch sees, as the Trainer takes it, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def exact_device(device: torch.device | None = None) -> torch.device:
    """Where sums and projections in float64 are worked out for what is on `device`.

    There, or on the CPU for Apple's MPS, which has no float64. By default of `preferred_device`.
    """
    device = device or preferred_device()
    return torch.device("cpu") if device.type == "mps" else device


def another_head(model: Any, *, num_labels: int, regression: bool) -> Any:
    """A classifier with other outputs that shares the backbone of `model`; its head is zero.

    Base models are large and heads small: tasks with other labels need no second base.
    """
    config, prefix = copy.deepcopy(model.config), model.base_model_prefix
    config.num_labels = num_labels
    config.problem_type = "regression" if regression else "single_label_classification"
    with torch.device("meta"):
        other = type(model)(config)
    below = getattr(model, prefix)
    setattr(other, prefix, below)
    place = next(below.parameters())
    for name, module in other.named_children():
        if name != prefix:
            module.to_empty(device=place.device).to(place.dtype)
            for parameter in module.parameters():
                torch.nn.init.zeros_(parameter)
    return other.eval()


def _called(model: Any, name: str) -> Any:
    """The model under the name that adapters made on it give to their base.

    PEFT takes it from the model itself, which keeps what it was loaded from, not from its config.
    """
    model.config.name_or_path = model.name_or_path = name
    return model


def load_tokenizer(path: str) -> Any:
    """The tokenizer; a missing padding token becomes the end token, as decoders need.

    Raises:
        AssetError: nothing loadable at `path`.
    """
    with _said_plainly(path):
        tokenizer = cast(Any, AutoTokenizer).from_pretrained(path, **_NO_CODE)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def agree_on_padding(model: Any, tokenizer: Any) -> Any:
    """The model, its padding token the tokenizer's where it names none, as Llama does not.

    A decoder reads its answer off the last token of a row that is not padding.
    """
    config = model.config.get_text_config()
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    return model


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash of vocabulary and special tokens: equal hashes cut texts alike."""
    special = {k: str(v) for k, v in tokenizer.special_tokens_map.items()}
    return fingerprint({"vocabulary": tokenizer.get_vocab(), "special": special})


def load_tagger(path: str, *, num_labels: int, name: str | None = None) -> Any:
    """The model with a token-classification head, its new weights drawn under the seed 0.

    Raises:
        AssetError: nothing loadable at `path`.
    """
    with _said_plainly(path), torch.random.fork_rng():
        torch.manual_seed(0)
        model = cast(Any, AutoModelForTokenClassification).from_pretrained(
            path, use_safetensors=True, **_NO_CODE, num_labels=num_labels
        )
    return _called(model, name or path)


_AUTO: dict[str, Any] = {"CAUSAL_LM": AutoModelForCausalLM, "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM}


def load_for(
    path: str,
    task_type: str,
    *,
    num_labels: int = 2,
    seed: int = 0,
    name: str | None = None,
) -> Any:
    """The model with the head that PEFT's `task_type` is for, so that layers have its names.

    Raises:
        AssetError: nothing loadable at `path`.
        UnknownNameError: a task type that cannot be started here.
    """
    if task_type == "SEQ_CLS":
        return load_classifier(
            path, num_labels=num_labels, regression=num_labels == 1, seed=seed, name=name
        )
    if task_type not in _AUTO:
        raise unknown_name("task type", task_type, ["SEQ_CLS", *_AUTO])
    with _said_plainly(path):
        model = _AUTO[task_type].from_pretrained(path, use_safetensors=True, **_NO_CODE)
    return _called(model, name or path)


def language_task_type(path: str) -> str:
    """PEFT's task type for the language model at `path`: a decoder's or an encoder-decoder's.

    Raises:
        AssetError: nothing loadable at `path`, or a model that writes no text.
    """
    config = load_config(path)
    if config.is_encoder_decoder:
        return "SEQ_2_SEQ_LM"
    # Encoders can be had as decoders too, but only one that was made as such writes text.
    encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not config.is_decoder
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or encoder:
        raise AssetError(
            f"model '{path}' ({config.model_type}) writes no text: take a decoder or an "
            "encoder-decoder, or train it as a classifier."
        )
    return "CAUSAL_LM"


def load_language_model(path: str, *, name: str | None = None) -> Any:
    """The decoder or encoder-decoder at `path`, in eval mode; raises what `load_for` does."""
    return load_for(path, language_task_type(path), name=name).eval()


def encode(
    tokenizer: Any, texts: Sequence[tuple[str, str | None]], max_length: int
) -> list[dict[str, Any]]:
    """Token ids of texts or pairs, cut to `max_length`, not yet padded; what was cut is said."""
    found: list[dict[str, Any]] = []
    cut = 0
    for text, pair in texts:
        encoded = tokenizer(text, pair, truncation=True, max_length=max_length)
        cut += any(part.overflowing for part in encoded.encodings or ())
        found.append(dict(encoded))
    say_cut(cut, len(texts), "texts", max_length)
    return found


def say_cut(cut: int, of: int, what: str, max_length: int) -> None:
    """Say how many texts or prompts were too long; each line once per process."""
    line = f"{cut} of {of} {what} are longer than {max_length} tokens and were cut (--max-length)."
    if cut and line not in _said:
        _said.add(line)
        _log.warning(line)


_said: set[str] = set()


# The names of version 0.1, for one release.
load_trunk, load_skeleton = load_backbone, load_meta_model
