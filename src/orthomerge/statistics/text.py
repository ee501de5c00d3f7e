"""From texts to batches: reading a sample, tokenising it, grouping by length."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from orthomerge.errors import StatisticsError, reason, unknown_name
from orthomerge.io.tables import SUFFIXES, read_table
from orthomerge.models.loading import encode

# What Datasets' save_to_disk leaves in a folder, of one split and of several.
_SAVED = ("state.json", "dataset_dict.json")


def read_texts(
    source: str | Path, *, text_column: str = "text", pair_column: str | None = None
) -> list[tuple[str, str | None]]:
    """Texts, or pairs of texts, from a JSONL, CSV, TSV or Parquet file or a data set.

    A data set is an id of the hub, a folder of such files, or one that Datasets' `save_to_disk`
    wrote; of several splits it is "train".

    Raises:
        StatisticsError: no such file or data set, no such column, or no rows.
    """
    path = Path(source)
    frame = read_table(path, StatisticsError) if path.suffix in SUFFIXES else _data_set(str(source))
    columns = [str(c) for c in frame.columns]
    for column in filter(None, (text_column, pair_column)):
        if column not in columns:
            raise unknown_name("column", column, columns, where=f"'{source}'")
    rows = frame.dropna(subset=[text_column])
    texts = cast(list[str], rows[text_column].astype(str).tolist())
    pairs: list[str | None] = [None] * len(texts)
    if pair_column:
        pairs = cast(list[str | None], rows[pair_column].astype(str).tolist())
    found = [(t, p) for t, p in zip(texts, pairs, strict=True) if t.strip()]
    if not found:
        raise StatisticsError(f"'{source}' holds no text in column '{text_column}'.")
    return found


def _data_set(source: str) -> Any:
    """A folder that Datasets wrote, or what it reads by that name."""
    import datasets
    import pandas

    try:
        if any((Path(source) / name).is_file() for name in _SAVED):
            saved = datasets.load_from_disk(source)
            loaded = saved["train"] if isinstance(saved, datasets.DatasetDict) else saved
        else:
            loaded = datasets.load_dataset(source, split="train")
        return pandas.DataFrame(loaded.to_dict())
    except Exception as problem:
        raise StatisticsError(
            f"no data '{source}': no file of that name ({', '.join(SUFFIXES)}), and the hub "
            f"said: {reason(problem)}."
        ) from problem


def sample_texts(
    texts: Sequence[tuple[str, str | None]], samples: int, seed: int
) -> list[tuple[str, str | None]]:
    """A seeded sample without replacement, all of them when there are fewer."""
    order = random.Random(seed).sample(range(len(texts)), min(samples, len(texts)))
    return [texts[i] for i in order]


def batches(
    texts: Sequence[tuple[str, str | None]],
    tokenizer: Any,
    *,
    batch_size: int = 32,
    max_length: int = 128,
) -> Iterator[dict[str, Any]]:
    """Batches of model inputs padded on the right, texts of like length together.

    On the right, so that a text's positions are those it has alone whatever the tokenizer prefers.
    """
    encoded = encode(tokenizer, texts, max_length)
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]["input_ids"]))
    for start in range(0, len(order), batch_size):
        chunk = [encoded[i] for i in order[start : start + batch_size]]
        yield dict(tokenizer.pad(chunk, padding_side="right", return_tensors="pt"))
