"""The things Tonfa Mini can draw, and the words for each. One phrase never names two things."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recipe.everyday_words import EVERYDAY_WORDS, FAVOURITES, UNWANTED
from recipe.sources import NAMES

GROUPS = (
    "smileys",
    "people",
    "component",
    "animals",
    "food",
    "travel",
    "activities",
    "objects",
    "symbols",
    "flags",
)
THINGS = frozenset({"animals", "food", "travel", "activities", "objects"})
# Letters, digits and signs of user interfaces: nobody asks for a picture of them.
SIGNS = frozenset(
    [
        "keycap",
        "alphanum",
        "arrow",
        "av-symbol",
        "math",
        "punctuation",
        "currency",
        "gender",
        "country-flag",
        "subdivision-flag",
        "skin-tone",
        "hair-style",
        "transport-sign",
        "other-symbol",
        "warning",
        "religion",
        "zodiac",
        "geometric",
        "person-symbol",
        "family",
    ]
)
REPEATS = re.compile(r"^(man|woman|men|women|kiss:|couple)\b.+|o’clock|-thirty|facing right|skin tone")
COLOUR_WORDS = re.compile(
    r"\b(white|black|grey|red|orange|yellow|green|teal|blue|purple|pink|brown|gold|silver|violet|cream|mint)\b"
)
SEVERAL = re.compile(r"s$|\b(and|with|hearts|pair|notes|bacon|sunrise|sunset|cityscape|park|showing)\b")


@dataclass(frozen=True, slots=True)
class Concept:
    """One thing. `names` are (phrase, weight); `weight` is how often it is drawn beside the others."""

    key: str  # code points, joined by "-", without the variation selector
    names: tuple[tuple[str, float], ...]
    group: str
    subgroup: str
    weight: float

    @property
    def name(self) -> str:
        return self.names[0][0]

    @property
    def is_thing(self) -> bool:
        return self.group in THINGS or self.subgroup == "heart"

    @property
    def is_countable(self) -> bool:
        """Drawings that already show several of something cannot be counted."""
        return self.is_thing and (not SEVERAL.search(self.name) or self.name.endswith(("ss", "us")))

    @property
    def tint_names(self) -> tuple[tuple[str, float], ...]:
        """Names to which a colour can be added: "blue apple", but not "blue red apple"."""
        if self.group not in THINGS:
            return ()
        return tuple((name, weight) for name, weight in self.names if not COLOUR_WORDS.search(name))


def normal_key(code_points: str) -> str:
    """Code points as the packages spell them -> one spelling for all."""
    return re.sub(r"-?fe0f", "", code_points.lower()).strip("-").lstrip("0")


def read_concepts(downloads: Path, available: Iterable[str]) -> list[Concept]:
    """The concepts whose key is in `available`, sorted by key."""
    wanted = set(available)
    folder = downloads / NAMES.folder / "en"
    subgroups = {s["order"]: s["key"] for s in _json(folder / "messages.json")["subgroups"]}
    rows = []
    for emoji in _json(folder / "data.json"):
        key = normal_key(emoji["hexcode"])
        group = GROUPS[emoji["group"]] if "group" in emoji else "component"
        subgroup = subgroups.get(emoji.get("subgroup"), "")
        label = emoji["label"]
        if key not in wanted or group in ("flags", "component") or subgroup in SIGNS or label in UNWANTED:
            continue
        if REPEATS.search(label):
            continue
        rows.append((key, label, group, subgroup))
    return _name(rows, _short_codes(folder))


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _short_codes(folder: Path) -> dict[str, list[str]]:
    """Chat short codes per key, as words."""
    codes: dict[str, list[str]] = {}
    for name in ("emojibase", "github"):
        for hexcode, found in _json(folder / "shortcodes" / f"{name}.json").items():
            words = [found] if isinstance(found, str) else found
            codes.setdefault(normal_key(hexcode), []).extend(w.replace("_", " ").replace("-", " ") for w in words)
    return codes


def primary_name(label: str, group: str, subgroup: str) -> str:
    """CLDR's label as a prompt would say it."""
    name = label.lower().replace("“", "").replace("”", "").replace("’", "'")
    name = re.sub(r"^(person|woman|man): (.*)", r"\1 with \2", name)
    plain_face = group == "smileys" and subgroup.startswith("face-") and subgroup != "face-costume"
    return name if not plain_face or "face" in name else f"{name} face"


def _name(rows: list[tuple[str, str, str, str]], short_codes: dict[str, list[str]]) -> list[Concept]:
    """Give out phrases in three rounds, so that the best claim to a phrase wins."""
    owner: dict[str, str] = {}
    names: dict[str, list[tuple[str, float]]] = {key: [] for key, *_ in rows}

    def claim(key: str, phrase: str, weight: float) -> None:
        if owner.setdefault(phrase, key) == key and phrase not in (n for n, _ in names[key]):
            names[key].append((phrase, weight))

    for key, label, group, subgroup in rows:
        claim(key, primary_name(label, group, subgroup), 4.0)
    for key, label, _, _ in rows:
        for phrase in EVERYDAY_WORDS.get(label, ()):
            claim(key, phrase, 3.0)
    for key, _, group, _ in rows:
        if group in THINGS:
            for phrase in short_codes.get(key, ()):
                if re.fullmatch(r"[a-z][a-z' ]{2,24}", phrase):
                    claim(key, phrase, 0.7)
    concepts = []
    for key, label, group, subgroup in rows:
        if not names[key]:
            continue  # another drawing of the same name
        favourite = label in FAVOURITES or label in EVERYDAY_WORDS
        weight = 2.5 if favourite else 0.5 if group in ("people", "symbols") else 1.0
        concepts.append(Concept(key, tuple(names[key]), group, subgroup, weight))
    return sorted(concepts, key=lambda c: c.key)


def save_concepts(concepts: list[Concept], path: Path) -> None:
    path.write_text(json.dumps([asdict(c) for c in concepts], ensure_ascii=False), encoding="utf-8")


def load_concepts(path: Path) -> list[Concept]:
    rows = _json(path)
    return [Concept(**{**row, "names": tuple((n, w) for n, w in row["names"])}) for row in rows]
