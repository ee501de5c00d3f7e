"""Texts as token ids: what is too long is cut, counted and said once."""

from __future__ import annotations

from orthomerge.models import loading


def test_texts_that_are_cut_are_counted_and_said_once(tiny_tokenizer, caplog):
    loading._said.clear()
    texts = [("the film " * 9, None), ("the film", None), ("a king", "a queen " * 9)]
    with caplog.at_level("WARNING", logger="orthomerge"):
        encoded = loading.encode(tiny_tokenizer, texts, 12)
        loading.encode(tiny_tokenizer, texts, 12)
        loading.encode(tiny_tokenizer, texts[1:2], 12)
    assert [len(e["input_ids"]) for e in encoded] == [12, 4, 12]
    assert caplog.messages == [
        "2 of 3 texts are longer than 12 tokens and were cut (--max-length)."
    ]
