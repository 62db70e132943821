"""What names, folders and small text files tell of a request. Knows no torch: importing it takes seconds, and a
mistake in a name should be answered at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine import recipe
from engine.folders import ModelCard, check_writable, find_lora, find_model, named_path, read_card
from engine.problems import bad_request
from engine.requests import ImageRequest, Request, VerifyRequest


@dataclass(frozen=True, slots=True)
class SettledLora:
    """A LoRA that was found. name: as people call it, without a folder."""

    name: str
    path: Path
    strength: float


def check_wish(request: Request) -> None:
    """Refuse what can be refused before anything is loaded. Raises ProblemError."""
    match request:
        case ImageRequest():
            card = read_card(find_model(request.model))
            check_out(request.out)
            settled_size(request, card, [])
            settled_loras(request, card)
        case VerifyRequest():
            path = named_path(request.file)
            recipe.recipe_of(recipe.read_png(path)[1], path.name)


def settled_size(request: ImageRequest, card: ModelCard, notices: list[str]) -> tuple[int, int]:
    """Width and height in pixels; `notices` gets what is not as it was asked."""
    return (
        _snapped("width", request.width, card.default_size[0], card, notices),
        _snapped("height", request.height, card.default_size[1], card, notices),
    )


def _snapped(name: str, asked: int | None, default: int, card: ModelCard, notices: list[str]) -> int:
    """The nearest size in pixels that the model takes; what is outside its range is a problem."""
    value = default if asked is None else asked
    if not card.size_min <= value <= card.size_max:
        if card.size_min == card.size_max:
            size = f"{card.size_min} x {card.size_min}"
            raise bad_request(f"{card.name} makes pictures of {size} pixels only.", f"Leave the {name} out.")
        raise bad_request(
            f"{card.name} makes pictures of {card.size_min} to {card.size_max} pixels a side, not {value}.",
            f"Choose another {name}.",
        )
    step = card.size_step
    low, high = -(-card.size_min // step) * step, card.size_max // step * step
    snapped = min(max((value + step // 2) // step * step, low), high)
    if snapped != value:
        notices.append(f"The {name} {value} became {snapped}: {card.name} takes multiples of {step}.")
    return snapped


def settled_loras(request: ImageRequest, card: ModelCard) -> tuple[SettledLora, ...]:
    """The LoRAs' files and names, in the request's order."""
    return tuple(_lora(choice.file, choice.strength, card) for choice in request.loras)


def _lora(file: str, strength: float, card: ModelCard) -> SettledLora:
    path = find_lora(file, card)
    brought = next((one.name for one in card.loras if Path(one.file) == path), path.stem)
    return SettledLora(brought, path, float(strength))


def check_out(out: str) -> None:
    """Refuse a place where nothing can be written before an hour is spent on pictures for it."""
    if not out:
        return
    path = named_path(out)
    if path.is_dir():
        check_writable(path)
        return
    if path.suffix.lower() != ".png":
        raise bad_request(f"Pictures are saved as PNG, not as {path.name!r}.", "Choose a name that ends in .png.")
    check_writable(path.parent)
