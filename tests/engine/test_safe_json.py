"""JSON nobody vouches for ends in values or in a problem, in time that grows with its length."""

from __future__ import annotations

import json

import pytest

from engine.problems import ProblemError
from engine.safe_json import MAX_JSON_BYTES, MAX_NESTING, parse_json

LARGE = MAX_JSON_BYTES - 100


def refused(text: str | bytes) -> str:
    with pytest.raises(ProblemError) as caught:
        parse_json(text, "The file")
    return caught.value.problem.what


# Quadratic time would be hours for these; the suite's timeout ends such a test.
@pytest.mark.parametrize(
    "text",
    [
        '"' + '\\"' * (LARGE // 2),
        '"' + '\\"' * (LARGE // 2) + "\\",
        '{"a": "' + '\\"[' * (LARGE // 3),
        '"' + "\\" * (LARGE // 2 * 2 + 1),
        '["' + '","\\' * (LARGE // 4),
    ],
    ids=["quotes", "lone backslash at the end", "brackets", "backslashes", "many strings"],
)
@pytest.mark.timeout(60)
def test_a_megabyte_of_unclosed_string_is_refused_in_linear_time(text):
    assert "not valid JSON" in refused(text)


@pytest.mark.timeout(60)
def test_a_key_that_comes_twice_is_found_among_very_many():
    names = [f'"{number}":0' for number in range(90_000)]
    assert "'89999' stands in it twice" in refused("{" + ",".join([*names, names[-1]]) + "}")


def test_characters_beyond_the_first_plane_come_through_either_spelling():
    assert parse_json('["\\ud83e\\udd8a", "🦊"]', "It") == ["🦊", "🦊"]
    assert "not text" in refused('["\\udd8a"]')


def test_brackets_within_strings_are_no_nesting():
    value = {'a\\"[[': ["[" * 100, '\\"' + "{" * 100, "\\"], "b": []}
    assert parse_json(json.dumps(value), "It") == value
    deep = "[" * MAX_NESTING + "]" * MAX_NESTING
    assert parse_json(deep, "It")
    assert "nested deeper" in refused(f'["\\\\", {deep}]')


@pytest.mark.parametrize(
    "text", ["NaN", "[1e999]", "1" * 30, '{"a":1,"a":2}', b"\xff", "", " " * (LARGE + 101), '{"\\ud800": 1}']
)
def test_other_nonsense_is_refused(text):
    assert refused(text)
