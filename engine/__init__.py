"""The engine turns requests into events. This is its front door.

Importing it costs milliseconds: requests, events and problems are plain values. `Engine`, which brings torch, is
resolved when first asked for (PEP 562).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine import events, problems, requests

if TYPE_CHECKING:
    from engine.session import Engine

__all__ = ["Engine", "events", "problems", "requests"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from engine.session import Engine

        return Engine
    raise AttributeError(f"module 'engine' has no attribute {name!r}")
