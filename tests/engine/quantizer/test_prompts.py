"""Calibration prompts come from files nobody vouches for; both sets are always full."""

from __future__ import annotations

import pytest

from engine.problems import ProblemError
from engine.quantizer.prompts import choose_prompts, read_prompts


def test_blank_lines_and_remarks_are_left_out(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa red fox\r\n\n# a remark\n  two cats  \n".encode())
    assert read_prompts(path) == ("a red fox", "two cats")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no prompts"),
        (b"# only remarks\n\n", "no prompts"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"a\0b", "no prompt"),
        (b"x" * 20_000, "no prompt"),
        (b"a\n" * (3 * 2**20), "larger than"),
    ],
    ids=["empty", "remarks", "not text", "NUL", "long line", "large"],
)
def test_what_is_no_list_of_prompts_is_a_problem(tmp_path, content, said):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(ProblemError, match=said):
        read_prompts(path)


@pytest.mark.parametrize("name", ["missing.txt", ".", "a\0b"])
def test_what_is_no_file_is_a_problem(tmp_path, name):
    with pytest.raises(ProblemError, match="cannot be read"):
        read_prompts(tmp_path / name)


def test_held_out_prompts_are_others():
    prompts = tuple(f"prompt {i}" for i in range(100))
    sets = choose_prompts(prompts, 32, 8, seed=0)
    assert len(set(sets.calibration)) == 32
    assert len(set(sets.held_out)) == 8
    assert not set(sets.calibration) & set(sets.held_out)
    assert sets.calibration[-1] == ""  # what is predicted beside the prompt when cfg is above 1
    assert sets == choose_prompts(prompts, 32, 8, seed=0)
    assert sets != choose_prompts(prompts, 32, 8, seed=1)


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_few_prompts_are_repeated(count):
    prompts = tuple(f"prompt {i}" for i in range(count))
    sets = choose_prompts(prompts, 8, 4, seed=0)
    assert (len(sets.calibration), len(sets.held_out)) == (8, 4)
    if count > 1:
        assert not set(sets.calibration) & set(sets.held_out)
