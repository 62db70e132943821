"""The little grammar that captions need."""

from __future__ import annotations

import re

IRREGULAR = {
    "mouse": "mice", "goose": "geese", "sheep": "sheep", "fish": "fish", "deer": "deer", "knife": "knives",
    "leaf": "leaves", "wolf": "wolves", "tooth": "teeth", "foot": "feet", "person": "people", "man": "men",
    "woman": "women", "child": "children", "loaf": "loaves", "ox": "oxen", "bison": "bison", "dice": "dice",
}  # fmt: skip


def with_article(phrase: str) -> str:
    """ "owl" -> "an owl"; plurals and counted things stay as they are."""
    if re.match(r"(the|a|an|two|three|some)\b", phrase):
        return phrase
    if phrase.endswith("s") and not phrase.endswith(("ss", "us", "is")):
        return phrase
    vowel = re.match(r"[aeiou]", phrase) and not re.match(r"(uni[^nm]|eu|one\b|ufo|u[-s])", phrase)
    return f"an {phrase}" if vowel or phrase.startswith(("hour", "x-ray")) else f"a {phrase}"


def plural(phrase: str) -> str:
    """ "red fox" -> "red foxes"."""
    head, _, last = phrase.rpartition(" ")
    if last in IRREGULAR:
        many = IRREGULAR[last]
    elif last.endswith("s") and not last.endswith(("ss", "us")):
        many = last
    elif re.search(r"(s|x|z|ch|sh)$", last):
        many = f"{last}es"
    elif re.search(r"[^aeiou]y$", last):
        many = f"{last[:-1]}ies"
    else:
        many = f"{last}s"
    return f"{head} {many}".strip()
