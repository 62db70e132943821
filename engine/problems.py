"""Failures a person can act on: what happened, and the one next step.

Inside the engine such a failure travels as `ProblemError`, the one exception type that carries a `Problem`;
across the boundary (events, the command line) only the value goes. Anything else is a bug.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class ProblemKind(StrEnum):
    """What sort of failure it is; it decides the exit code of the command line and the icon in the window."""

    REQUEST = "request"  # something asked for does not make sense or does not exist
    FILE = "file"  # a file is damaged, foreign or unreadable
    MEMORY = "memory"  # it does not fit into graphics or system memory
    MACHINE = "machine"  # this computer cannot do it (no card, old driver, no disk space)
    ENGINE = "engine"  # the engine stopped unexpectedly: our bug


EXIT_CODE = {
    ProblemKind.REQUEST: 2,
    ProblemKind.FILE: 2,
    ProblemKind.MEMORY: 3,
    ProblemKind.MACHINE: 3,
    ProblemKind.ENGINE: 1,
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One failure in a person's words. Plain strings, so that it crosses processes and ends in a log."""

    kind: ProblemKind
    what: str  # what happened, in the user's words
    todo: str  # the one next step
    detail: str = ""  # for the log and the Details button

    def __str__(self) -> str:
        return f"{self.what} {self.todo}"


class ProblemError(Exception):
    """Carries a `Problem` through the engine; never crosses its boundary."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


def bad_request(what: str, todo: str) -> ProblemError:
    return ProblemError(Problem(ProblemKind.REQUEST, what, todo))


def bad_file(what: str, todo: str, detail: str = "") -> ProblemError:
    return ProblemError(Problem(ProblemKind.FILE, what, todo, detail))


def machine_cannot(what: str, todo: str, detail: str = "") -> ProblemError:
    return ProblemError(Problem(ProblemKind.MACHINE, what, todo, detail))


def not_enough_memory(needed_gib: float, free_gib: float, where: str = "graphics memory") -> Problem:
    return Problem(
        ProblemKind.MEMORY,
        what=f"This needs {needed_gib:.1f} GB of {where}; {free_gib:.1f} GB is free.",
        todo="Choose a smaller size, or close other programs that use the memory.",
    )


def engine_stopped(detail: str = "") -> Problem:
    return Problem(
        ProblemKind.ENGINE,
        what="The engine stopped and was started again.",
        todo="Press Continue to make the picture once more; nothing else was lost.",
        detail=detail,
    )


def internal_error(detail: str) -> Problem:
    return Problem(
        ProblemKind.ENGINE,
        what="Something went wrong inside Tonfa.",
        todo="Try again. If it happens once more, copy the details and report them.",
        detail=detail,
    )
