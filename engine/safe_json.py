"""JSON from files nobody vouches for: bounded in size and depth, no key twice, no NaN."""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from engine.problems import bad_file

MAX_NESTING = 32
MAX_JSON_BYTES = 1 << 20  # a config has a few KiB; 1 MiB of "[],[]," is 32 MiB of lists
# A string that is never closed ends with the text: searched for again at each quote in it, it took quadratic time.
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)
_HALF_A_PAIR = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")


def parse_json(text: str | bytes, source: str) -> Any:
    """Parse a small JSON text (a config.json, a bundle.json, a value of a safetensors file's metadata).

    `source` says in the user's words where it is from. Raises ProblemError for anything but sound JSON of at most
    1 MiB and 32 levels, with each key once and finite numbers.
    """

    def refuse(why: str) -> NoReturn:
        raise bad_file(f"{source} is damaged: {why}.", "Get the file again from where it came from.")

    def pairs_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            for name, _ in pairs:
                if name in seen:
                    refuse(f"the key {name[:100]!r} stands in it twice")
                seen.add(name)
        return result

    def finite_float(digits: str) -> float:
        value = float(digits)
        if value in (float("inf"), float("-inf")):
            refuse(f"the number {digits[:30]} is too large")
        return value

    def short_int(digits: str) -> int:
        if len(digits) > 20:
            refuse(f"the number {digits[:30]}... is too large")
        return int(digits)

    if len(text) > MAX_JSON_BYTES:
        refuse(f"expected at most {MAX_JSON_BYTES} bytes of JSON, found {len(text)}")
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
    except UnicodeDecodeError:
        refuse("it is not UTF-8 text")
    depth = 0
    for token in _STRING_OR_BRACKET.finditer(text):
        if token[0] in "[{":
            depth += 1
        elif token[0] in "]}":
            depth -= 1
        if depth > MAX_NESTING:
            refuse(f"its JSON is nested deeper than {MAX_NESTING} levels")
    try:
        value = json.loads(
            text,
            object_pairs_hook=pairs_once,
            parse_float=finite_float,
            parse_int=short_int,
            parse_constant=lambda name: refuse(f"{name} is not a number"),
        )
        if _HALF_A_PAIR.search(text):  # such a string can neither be shown, nor written, nor name a file
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        refuse("it holds half a character, which is not text")
    except (ValueError, RecursionError) as error:
        refuse(f"it is not valid JSON ({error})")
    return value
