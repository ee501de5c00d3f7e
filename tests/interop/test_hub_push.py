"""A merged folder pushed by huggingface_hub: the folder is what the hub wants, card and all."""

from __future__ import annotations

import json

import huggingface_hub
from conftest import call
from fake_hub import FakeHub
from peft import PeftConfig
from small_adapters import make_adapter

from orthomerge.adapters import read_adapter


def test_a_merged_folder_is_pushed_as_it_is(tmp_path, tiny_base, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY", True)
    for seed, name in enumerate("ab"):
        make_adapter(tmp_path / name, tiny_base, seed)
    merged = tmp_path / "merged"
    call("merge", tmp_path / "a", tmp_path / "b", "--base", "org/base", "--output", merged)
    with FakeHub() as hub:
        api = huggingface_hub.HfApi(endpoint=hub.url, token="hf_nothing")
        api.create_repo("org/merged", private=False)
        api.upload_folder(repo_id="org/merged", folder_path=merged)
    there = {str(p.relative_to(merged)): p.read_bytes() for p in merged.rglob("*") if p.is_file()}
    assert hub.repos == ["org/merged"]
    assert hub.files == there
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "merge.json"} < set(
        there
    )
    assert hub.cards == [there["README.md"].decode()]  # the client had the hub read its header

    card = huggingface_hub.ModelCard.load(merged / "README.md", ignore_metadata_errors=False)
    assert card.data.base_model == "org/base"
    assert card.data.library_name == "peft"
    assert {"lora", "merged"} <= set(card.data.tags)

    # What is fetched of it is an adapter, with the base that the card names.
    fetched = tmp_path / "fetched"
    for name, content in hub.files.items():
        (fetched / name).parent.mkdir(parents=True, exist_ok=True)
        (fetched / name).write_bytes(content)
    assert PeftConfig.from_pretrained(str(fetched)).base_model_name_or_path == "org/base"
    assert read_adapter(fetched).sha256 == read_adapter(merged).sha256
    assert json.loads(hub.files["merge.json"])["base_model"] == "org/base"
