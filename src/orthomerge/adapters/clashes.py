"""Where the licences of a merge's parts do not go together, in words: a reader's help, no advice.

The families are those of the hub's identifiers. What a family asks is put in one clause; the texts
themselves decide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from orthomerge.adapters.licences import Licence

_FREE = (
    "apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "isc", "zlib",
    "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "unlicense", "wtfpl", "afl-3.0",
    "artistic-2.0", "bsl-1.0", "ecl-2.0", "ncsa", "ms-pl", "postgresql", "pddl", "odc-by",
    "cdla-permissive-1.0", "cdla-permissive-2.0", "etalab-2.0", "openmdw-1.0",
)  # fmt: skip
_RESEARCH = (
    "h-research", "intel-research", "apple-amlr", "fair-noncommercial-research-license",
    "deepfloyd-if-license", "c-uda",
)  # fmt: skip
_ALIKE = ("gpl", "agpl", "cc-by-sa", "cc-by-nc-sa", "odbl", "eupl", "osl", "gfdl", "cdla-sharing")
_OWN_PART = ("lgpl", "mpl", "epl", "lppl")
_OWN = ("llama", "gemma", "grok")
# What is under the first may be passed on, changed, under the second: their texts say so.
_ONE_WAY = (
    ("cc-by-sa-4.0", "gpl-3.0"), ("gpl-3.0", "agpl-3.0"), ("cc-by-nc-4.0", "cc-by-nc-sa-4.0"),
    ("cc-by-nc-3.0", "cc-by-nc-sa-3.0"),
)  # fmt: skip


class Remark(NamedTuple):
    """One thing to know: a "clash" of two parts, or a "condition" that goes with one."""

    kind: str
    text: str


def free(licence: str) -> bool:
    """Whether it asks for little more than its notice."""
    return licence in _FREE


def not_commercial(licence: str) -> bool:
    """Whether it forbids commercial use."""
    return licence.startswith("cc-by-nc") or licence in _RESEARCH


def no_changes(licence: str) -> bool:
    """Whether changed versions may not be passed on."""
    return licence.startswith("cc-by") and "-nd" in licence


def alike(licence: str) -> bool:
    """Whether it asks that what is made with it be passed on under itself."""
    return licence.startswith(_ALIKE)


def own_terms(licence: str) -> bool:
    """Whether it is a model maker's own, with rules of use that go with what is made of it."""
    return licence.startswith(_OWN) or "rail" in licence


def own_part(licence: str) -> bool:
    """Whether it asks only that its own part, changed or not, stay under itself."""
    return licence.startswith(_OWN_PART)


_FAMILIES = (free, not_commercial, no_changes, alike, own_part, own_terms)


def remarks(parts: Mapping[str, Licence]) -> list[Remark]:
    """What a reader should know before using a merge of these parts, clashes first.

    `parts` maps what the card calls a part to the licence it states.
    """
    held: dict[str, list[str]] = {}
    for part, licence in parts.items():
        if licence.id is not None:
            held.setdefault(licence.id, []).append(part)
    found = [*_unchanged(held), *_commerce(held), *_sharing(held), *_owners(held)]
    silent = [part for part, licence in parts.items() if licence.id is None]
    if silent:
        found.append(
            Remark(
                "condition",
                f"{listed(silent)} state{_s(silent)} no licence: without one nobody may take it "
                "for granted that they may be passed on; ask their owners.",
            )
        )
    return sorted(found, key=lambda remark: remark.kind != "clash")


def _unchanged(held: Mapping[str, list[str]]) -> list[Remark]:
    return [
        Remark(
            "clash", f"{_who(name, held)} forbids passing on changed versions, and a merge is one."
        )
        for name in held
        if no_changes(name)
    ]


def _commerce(held: Mapping[str, list[str]]) -> list[Remark]:
    """Parts that forbid commercial use among parts that allow it."""
    forbids = [name for name in held if not_commercial(name)]
    allows = [name for name in held if not not_commercial(name) and name != "other"]
    if not forbids or not allows:
        return []
    return [
        Remark(
            "clash",
            f"{_all(forbids, held)} forbid{_s(forbids)} commercial use, {_all(allows, held)} "
            f"allow{_s(allows)} it: the merge holds both, so the narrower terms bind the whole.",
        )
    ]


def _sharing(held: Mapping[str, list[str]]) -> list[Remark]:
    """Parts that ask the whole to be under their own licence, beside parts under others."""
    found: list[Remark] = []
    copyleft = [name for name in held if alike(name)]
    for name in copyleft:
        others = [o for o in held if o not in (name, "other") and (name, o) not in _ONE_WAY]
        tight = [o for o in others if _binds(o) and (o, name) not in _ONE_WAY]
        loose = [o for o in others if free(o)]
        if tight:
            found.append(
                Remark(
                    "clash",
                    f"{_who(name, held)} asks that the whole be passed on under {name} and nothing "
                    f"more be asked of it, which {_all(tight, held)} do{_es(tight)} not allow.",
                )
            )
        if "apache-2.0" in loose and name == "gpl-2.0":
            found.append(
                Remark(
                    "clash",
                    f"{_who(name, held)} and {_who('apache-2.0', held)} are held to be "
                    "incompatible by the GPL's authors (version 2 alone; version 3 is not).",
                )
            )
        elif loose:
            found.append(
                Remark(
                    "clash",
                    f"{_who(name, held)} asks that the whole be passed on under {name}: the merge "
                    f"cannot be offered under {_names(loose)}, as {_parts(loose, held)} "
                    f"{'is' if len(_flat(loose, held)) == 1 else 'are'}.",
                )
            )
    return found


def _binds(licence: str) -> bool:
    """Whether it asks more of the whole than its notice."""
    return not_commercial(licence) or alike(licence) or own_terms(licence)


def _owners(held: Mapping[str, list[str]]) -> list[Remark]:
    """Licences of a maker's own, whose rules go with the merge."""
    own = [name for name in held if own_terms(name)]
    found = [Remark("condition", f"{_who(name, held)} {_terms(name)}") for name in own]
    if len(own) > 1:
        found.append(
            Remark("clash", f"{_all(own, held)} each bring rules of their own; all of them apply.")
        )
    found += [
        Remark("condition", f"{_who(name, held)} asks that its own part stay under {name}.")
        for name in held
        if own_part(name)
    ]
    unknown = [name for name in held if not any(knows(name) for knows in _FAMILIES)]
    found += [
        Remark("condition", f"{_who(name, held)} is not known here: read its text.")
        for name in unknown
    ]
    return found


def _terms(licence: str) -> str:
    if licence.startswith("llama"):
        named = "" if licence == "llama2" else (
            ", 'Built with' and the model's name shown, a name that begins with 'Llama'"
        )  # fmt: skip
        return (
            "is a community licence, which goes with whatever is made of the model: its text and "
            f"notice{named}, its policy of acceptable use, and a licence of its own for services "
            "of more than 700 million monthly users."
        )
    return "has rules of use of its own, which must be passed on with whatever is made of it."


def _who(name: str, held: Mapping[str, list[str]]) -> str:
    return f"`{name}` ({', '.join(held[name])})"


def _all(names: Sequence[str], held: Mapping[str, list[str]]) -> str:
    return listed([_who(name, held) for name in names])


def _flat(names: Sequence[str], held: Mapping[str, list[str]]) -> list[str]:
    return [part for name in names for part in held[name]]


def _parts(names: Sequence[str], held: Mapping[str, list[str]]) -> str:
    return listed(_flat(names, held))


def _names(names: Sequence[str]) -> str:
    return listed([f"`{name}`" for name in names])


def listed(items: Sequence[str]) -> str:
    """Items in a sentence: a, b and c."""
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def _s(items: Sequence[str]) -> str:
    return "s" if len(items) == 1 else ""


def _es(items: Sequence[str]) -> str:
    return "es" if len(items) == 1 else ""
