"""Where things live: sources and assets, models, pictures, caches; and which models there are.

Plain values and no torch: the window lists models with it before the engine's process is up. Nothing here writes
into the program's own folder. `TONFA_HOME` moves everything a person owns (models, pictures, caches, settings) into
one folder; `TONFA_MODELS` adds models folders, separated as in PATH. A file `models-folders.json` in the settings
folder, a list of paths, does the same for the window.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import platformdirs

from engine.problems import ProblemError, bad_file, bad_request, machine_cannot
from engine.requests import BUILT_IN_MODEL
from engine.safe_json import MAX_JSON_BYTES, parse_json

APP = "Tonfa"
BUNDLE_FILE = "bundle.json"
BUNDLE_FORMAT = 1
HASHED_BYTES = 2**22  # at a time: 3 ms
TOKEN_PIXELS = 16  # the side of a token: latents are 8 times smaller, and 2 x 2 of them are one token
MODEL_SUFFIXES = (".safetensors",)
# Where ComfyUI and its relatives keep each kind of file below `models/`.
COMFY_FOLDERS = {
    "transformer": ("diffusion_models", "unet"),
    "text_encoder": ("text_encoders", "clip"),
    "vae": ("vae",),
    "lora": ("loras",),
}


# ---------------------------------------------------------------------------------------------------- places


def repository() -> Path:
    """The folder that holds engine/, kernels_cu/ and assets/: Tonfa runs from its folder."""
    return Path(__file__).resolve().parent.parent


def assets() -> Path:
    return repository() / "assets"


def _home() -> Path | None:
    home = os.environ.get("TONFA_HOME", "").strip()
    return Path(os.path.expanduser(home)).absolute() if home else None


def cache() -> Path:
    """Compiled kernels, hashes, measured times: everything that may be deleted at any time."""
    home = _home()
    return home / "cache" if home else platformdirs.user_cache_path(APP, appauthor=False)


def settings() -> Path:
    home = _home()
    return home / "settings" if home else platformdirs.user_config_path(APP, appauthor=False)


def logs() -> Path:
    home = _home()
    return home / "logs" if home else platformdirs.user_log_path(APP, appauthor=False)


def pictures() -> Path:
    """Where pictures go: the user's Pictures folder, as the system names it."""
    home = _home()
    return home / "pictures" if home else platformdirs.user_pictures_path() / APP


def user_models() -> Path:
    home = _home()
    return home / "models" if home else platformdirs.user_data_path(APP, appauthor=False) / "models"


def models_folders() -> list[Path]:
    """Folders that are searched for models and LoRAs, first wins: the user's own, added ones, the built-in."""
    added = [
        Path(os.path.expanduser(part))
        for part in os.environ.get("TONFA_MODELS", "").split(os.pathsep)
        if part.strip()
    ]
    listed = settings() / "models-folders.json"
    if listed.is_file():
        try:
            content = read_json(listed)
        except ProblemError:
            content = []  # a broken settings file must not hide the built-in model
        if isinstance(content, list):
            added += [Path(os.path.expanduser(part)) for part in content if isinstance(part, str) and part.strip()]
    return list(dict.fromkeys(folder.absolute() for folder in [*added, user_models(), assets()]))


# --------------------------------------------------------------------------------------------------- pictures


def todays_pictures(today: date | None = None) -> Path:
    """Pictures/Tonfa/YYYY-MM-DD, made if missing: what a request's `out` is when the window saves."""
    folder = pictures() / (today or date.today()).isoformat()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise machine_cannot(
            f"The pictures folder {folder} cannot be made.", "Choose another folder for pictures.", str(error)
        ) from None
    return folder


def next_picture(folder: Path, seed: int) -> Path:
    """The next free NNNN-seed.png in `folder`; numbers go on from the highest that is there."""
    numbers = [int(match[1]) for name in _names(folder) if (match := re.match(r"([0-9]{4,9})-", name))]
    return folder / f"{max(numbers, default=0) + 1:04d}-{seed}.png"


def _names(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(folder))
    except OSError:
        return []


def named_path(text: str) -> Path:
    """The path a person wrote; a leading ~ is their home. Raises ProblemError for what no file can be called."""
    path = Path(os.path.expanduser(text))
    try:
        os.stat(path / BUNDLE_FILE)  # the longest name that is looked for below it
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except (OSError, ValueError) as error:  # too long, a NUL, half a surrogate pair
        raise bad_request(f"No file can be called {text[:60]!r}.", "Choose another name.") from error
    return path


def check_writable(folder: Path) -> None:
    """Refuse a folder that is not there, or that takes no file. Raises ProblemError."""
    if not folder.is_dir():
        raise bad_request(f"There is no folder {folder}.", "Make the folder, or choose another.")
    if not os.access(folder, os.W_OK):
        raise bad_request(f"The folder {folder} cannot be written to.", "Choose another folder.")


# ------------------------------------------------------------------------------------------------ small files


def read_json(path: Path) -> Any:
    """Read a JSON file that may be damaged or hostile: at most 1 MiB, see safe_json. Raises ProblemError."""
    try:
        check_regular(path)
        with path.open("rb") as file:
            text = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise bad_file(f"{path.name} cannot be read.", "Check the file.", f"{path}: {error}") from None
    return parse_json(text, path.name)


def check_regular(path: Path) -> None:
    """Refuse a pipe or a device, which could be read for ever. Raises ProblemError; OSError where nothing is."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise bad_file(f"{path.name} is not a file.", "Choose a file.", str(path))


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is there complete or not at all: a temporary name, then one rename."""
    temporary = unfinished(path)
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise machine_cannot(
            f"{path.name} cannot be written to {path.parent}.",
            "Check that the folder may be written to and that the disk is not full.",
            str(error),
        ) from None
    finally:
        discard(temporary)


_unfinished: set[Path] = set()  # temporary files of this process, until they are renamed or discarded


def unfinished(path: Path) -> Path:
    """A temporary name beside `path`, short where that name is as long as a name may be. End it with `discard`."""
    temporary = path.with_name(f".tonfa-{os.getpid()}-{uuid.uuid4().hex[:8]}.part")
    _unfinished.add(temporary)
    return temporary


def discard(temporary: Path) -> None:
    """Remove a temporary file, if it is still there."""
    with contextlib.suppress(OSError):  # what failed before is what has to be told
        temporary.unlink(missing_ok=True)
    _unfinished.discard(temporary)


def discard_unfinished() -> None:
    """Remove all temporary files of this process, which is about to end without another word."""
    for temporary in tuple(_unfinished):
        discard(temporary)


def sha256(path: Path, check: Callable[[], None] = lambda: None) -> str:
    """The file's SHA-256 in hex; kept in the cache by (path, size, time), since model files have gigabytes.

    `check` is called again and again and may raise to stop. Raises ProblemError when the file cannot be read.
    """
    try:
        check_regular(path)
        return _sha256(path, check)
    except OSError as error:
        raise bad_file(f"{path.name} cannot be read.", "Check the file and its permissions.", str(error)) from None


def _sha256(path: Path, check: Callable[[], None]) -> str:
    status = path.stat()
    known_file = cache() / "hashes.json"
    key = f"{path.absolute()}|{status.st_size}|{status.st_mtime_ns}"
    known: dict[str, str] = {}
    try:
        content = read_json(known_file) if known_file.is_file() else {}
        known = {k: v for k, v in content.items() if isinstance(v, str)} if isinstance(content, dict) else {}
    except ProblemError:
        pass  # a damaged cache is made again
    if key not in known:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while piece := file.read(HASHED_BYTES):
                check()
                digest.update(piece)
        known[key] = digest.hexdigest()
        kept = dict(list(known.items())[-1000:])
        try:
            known_file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(known_file, json.dumps(kept).encode())
        except (OSError, ProblemError):
            pass  # without a cache it is only slower next time
    return known[key]


# ------------------------------------------------------------------------------------------------------ models


@dataclass(frozen=True, slots=True)
class LoraCard:
    """A LoRA that a model brings or that lies in a models folder. `file` goes into `LoraChoice.file`."""

    name: str
    file: str  # absolute path
    strength: float = 1.0
    words: tuple[str, ...] = ()  # trigger words
    sha256: str = ""  # what the bundle says the file is, "" where it says nothing


@dataclass(frozen=True, slots=True)
class ModelCard:
    """One model as a list shows it. `model` goes into `ImageRequest.model`.

    With `problem` set ("what is wrong, what to do") the model cannot be used and the other fields may be defaults.
    """

    model: str
    name: str
    folder: str
    family: str = ""
    version: str = ""
    licence: str = ""
    about: str = ""
    file_bytes: int = 0
    default_size: tuple[int, int] = (1024, 1024)  # width, height
    presets: tuple[tuple[str, int, int], ...] = ()  # name, width, height
    size_step: int = 16
    size_min: int = 16
    size_max: int = 8192
    steps: int = 20
    guidance: float | None = None  # None: the network takes no such number
    cfg: float = 1.0
    default_cfg: float = 1.0  # what a negative prompt with cfg 1 takes
    loras: tuple[LoraCard, ...] = ()
    words: tuple[str, ...] = ()  # what the model knows; empty = not told
    suggestions: tuple[str, ...] = ()  # prompts to start with
    problem: str = ""


@dataclass(frozen=True, slots=True)
class JsonFields:
    """A JSON object from outside. Reads typed fields of a JSON object and says which one is wrong."""

    content: dict[str, Any]
    file: str
    path: str = ""

    def wrong(self, key: str, expected: str) -> ProblemError:
        got = self.content.get(key)
        return bad_file(
            f"{self.file} is damaged: {self.path}{key} should be {expected}, not {str(got)[:60]!r}.",
            "Download the model again.",
        )

    def text(self, key: str, default: str | None = None) -> str:
        value = self.content.get(key, default)
        if not isinstance(value, str) or len(value) > 10_000:
            raise self.wrong(key, "text")
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        value = self.content.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self.wrong(key, f"a number from {low:g} to {high:g}")
        return value

    def whole(self, key: str, low: int, high: int, default: int | None = None) -> int:
        value = self.number(key, low, high, default)
        if not isinstance(value, int):
            raise self.wrong(key, "a whole number")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        value = self.content.get(key, [])
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise self.wrong(key, "a list of texts")
        return tuple(value)

    def items(self, key: str) -> list[Any]:
        value = self.content.get(key, [])
        if not isinstance(value, list):
            raise self.wrong(key, "a list")
        return value

    def inner(self, key: str) -> JsonFields:
        value = self.content.get(key)
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return JsonFields(value, self.file, f"{self.path}{key}.")


def bundle_fields(folder: Path) -> JsonFields:
    """The checked top level of a bundle's JSON; `engine.checkpoints.bundle` reads the rest from it."""
    content = read_json(folder / BUNDLE_FILE)
    if not isinstance(content, dict):
        raise bad_file(f"{folder.name}/{BUNDLE_FILE} is damaged: it is not an object.", "Download the model again.")
    fields = JsonFields(content, f"{folder.name}/{BUNDLE_FILE}")
    version = fields.whole("format", 1, 1_000_000)
    if version != BUNDLE_FORMAT:
        raise bad_file(f"The model {folder.name} was made for a newer Tonfa (format {version}).", "Update Tonfa.")
    return fields


def part_path(folder: Path, path: str, file: str) -> Path:
    """A part's file: below the bundle's folder, or an absolute path (a ComfyUI tree is read in place)."""
    if not path or "\0" in path:
        raise bad_file(f"{file} is damaged: a part has no path.", "Download the model again.")
    if Path(path).is_absolute():
        return Path(path)
    whole = Path(os.path.normpath(folder / path))
    if not whole.is_relative_to(os.path.normpath(folder)):
        raise bad_file(f"{file} names {path!r}, which is outside its folder.", "Use another model.")
    return whole


def read_card(folder: Path) -> ModelCard:
    """The card of a bundle. Raises ProblemError where the JSON is wrong or a part is missing or out of reach."""
    try:
        return _read_card(folder)
    except (OSError, ValueError) as error:
        raise bad_file(
            f"The files of the model {folder.name} cannot be read.", "Check its bundle.json.", repr(error)
        ) from None


def _read_card(folder: Path) -> ModelCard:
    fields = bundle_fields(folder)
    sizes, defaults = fields.inner("sizes"), fields.inner("defaults")
    step, smallest, largest = _size_limits(sizes)
    presets = []
    for preset in sizes.items("presets"):
        if not (isinstance(preset, list) and len(preset) == 3 and isinstance(preset[0], str)):
            raise bad_file(f"{fields.file} is damaged: a size preset is wrong.", "Download the model again.")
        presets.append((preset[0], *_size(preset[1:], smallest, largest, fields.file)))
    words, suggestions = _vocabulary(folder, fields)
    has_guidance = defaults.content.get("guidance") is not None
    return ModelCard(
        model=BUILT_IN_MODEL if folder == assets() / BUILT_IN_MODEL else str(folder),
        name=fields.text("name"),
        folder=str(folder),
        family=fields.text("family"),
        version=fields.text("version", ""),
        licence=fields.text("licence", ""),
        about=fields.text("about", ""),
        file_bytes=sum(path.stat().st_size for path in _parts(folder, fields)),
        default_size=_size(sizes.items("default"), smallest, largest, fields.file),
        presets=tuple(presets),
        size_step=step,
        size_min=smallest,
        size_max=largest,
        steps=defaults.whole("steps", 1, 1000),
        guidance=defaults.number("guidance", 0, 100) if has_guidance else None,
        cfg=defaults.number("cfg", 1, 100, 1.0),
        default_cfg=defaults.number("default_cfg", 1, 100, 1.0),
        loras=_bundle_loras(folder, fields),
        words=words,
        suggestions=suggestions,
    )


def _size_limits(sizes: JsonFields) -> tuple[int, int, int]:
    """Step, smallest and largest side in pixels: a token is 16 pixels wide, and one size at least must be left."""
    step = sizes.whole("step", TOKEN_PIXELS, 1024)
    smallest = sizes.whole("min", TOKEN_PIXELS, 65536)
    largest = sizes.whole("max", smallest, 65536)
    if step % TOKEN_PIXELS:
        raise sizes.wrong("step", f"a multiple of {TOKEN_PIXELS}")
    if -(-smallest // step) * step > largest:
        raise sizes.wrong("max", f"at least the first multiple of {step} above {smallest}")
    return step, smallest, largest


def _size(value: Any, smallest: int, largest: int, file: str) -> tuple[int, int]:
    if not (
        isinstance(value, list)
        and len(value) == 2
        and all(type(one) is int and smallest <= one <= largest for one in value)
    ):
        raise bad_file(
            f"{file} is damaged: a size should be two numbers from {smallest} to {largest}, not {str(value)[:60]}.",
            "Download the model again.",
        )
    return value[0], value[1]


def _parts(folder: Path, fields: JsonFields) -> list[Path]:
    """All part files, each once; missing ones are a problem that names the first."""
    parts = fields.inner("parts")
    paths = []
    for role in parts.content:
        path = part_path(folder, parts.inner(role).text("path"), fields.file)
        if not path.is_file():
            raise bad_file(
                f"The file {path.name} of the model {folder.name} is missing.", "Download the model again."
            )
        paths.append(path)
    return list(dict.fromkeys(paths))


def _bundle_loras(folder: Path, fields: JsonFields) -> tuple[LoraCard, ...]:
    cards = []
    for index, item in enumerate(fields.items("loras")):
        if not isinstance(item, dict):
            raise bad_file(f"{fields.file} is damaged: a LoRA is not an object.", "Download the model again.")
        one = JsonFields(item, fields.file, f"loras.{index}.")
        path = part_path(folder, one.text("path"), fields.file)
        cards.append(
            LoraCard(
                one.text("name"),
                str(path),
                one.number("strength", -100, 100, 1.0),
                one.texts("words"),
                one.text("sha256", "").lower(),
            )
        )
    return tuple(cards)


def _vocabulary(folder: Path, fields: JsonFields) -> tuple[tuple[str, ...], tuple[str, ...]]:
    parts = fields.inner("parts")
    if "vocabulary" not in parts.content:
        return (), ()
    path = part_path(folder, parts.inner("vocabulary").text("path"), fields.file)
    content = read_json(path)
    if not isinstance(content, dict):
        raise bad_file(f"{path.name} is damaged: it is not an object.", "Download the model again.")
    one = JsonFields(content, path.name)
    return one.texts("words"), one.texts("suggestions")


def _bundle_folders() -> Iterator[Path]:
    for root in models_folders():
        for folder in [root, *(root / name for name in _names(root))]:
            if (folder / BUNDLE_FILE).is_file():
                yield folder


def list_models() -> list[ModelCard]:
    """Every bundle in the models folders, the built-in first, then by name; damaged ones carry their problem."""
    cards: list[ModelCard] = []
    for folder in dict.fromkeys(_bundle_folders()):
        try:
            cards.append(read_card(folder))
        except ProblemError as error:
            cards.append(ModelCard(str(folder), folder.name, str(folder), problem=str(error.problem)))
        except OSError as error:
            cards.append(ModelCard(str(folder), folder.name, str(folder), problem=f"It cannot be read: {error}."))
    return sorted(cards, key=lambda card: (bool(card.problem), card.model != BUILT_IN_MODEL, card.name.casefold()))


def find_model(model: str) -> Path:
    """The bundle's folder for what a request names: a path, a folder's name, or a bundle's own name."""
    path = named_path(model)
    if path.name == BUNDLE_FILE and path.is_file():
        return path.parent.absolute()
    if (path / BUNDLE_FILE).is_file():
        return path.absolute()
    found = list(dict.fromkeys(_bundle_folders()))
    for folder in found:
        if folder.name == model:
            return folder
    for card in list_models():
        if card.name.casefold() == model.casefold():
            return Path(card.folder)
    if path.is_file():
        raise bad_request(
            f"{path.name} is a single file; a picture needs a whole model (text encoders and VAE too).",
            "Choose a model folder with a bundle.json.",
        )
    if path.is_dir():
        raise bad_request(
            f"The folder {path.name} holds no {BUNDLE_FILE}.", "Choose a model folder with a bundle.json."
        )
    known = ", ".join(folder.name for folder in found) or "none"
    raise bad_request(f"There is no model {model!r}.", f"Choose one of: {known}; or give a folder.")


def comfy_files(role: str) -> list[Path]:
    """Files of a role ("transformer", "text_encoder", "vae", "lora") in ComfyUI trees among the models folders.

    Read in place: nothing is copied or changed. Subfolders count; links are followed once.
    """
    files: list[Path] = []
    for root in models_folders():
        for base in (root, root / "models"):
            for name in COMFY_FOLDERS[role]:
                for where, _, names in os.walk(base / name):
                    files += [Path(where) / one for one in sorted(names) if one.endswith(MODEL_SUFFIXES)]
    return list(dict.fromkeys(files))


def list_loras() -> list[LoraCard]:
    """LoRA files in the models folders, by name; what a model brings is on its own card."""
    return [LoraCard(path.stem, str(path)) for path in sorted(comfy_files("lora"), key=lambda p: p.stem.casefold())]


def find_lora(file: str, card: ModelCard) -> Path:
    """The file of a LoRA a request names: the bundle's own names first, then a path, then the models folders."""
    found = _known_lora(file, card)
    if found is not None:
        return found
    name, _, strength = file.rpartition(":")
    if name.strip() and _known_lora(name, card) is not None:
        raise bad_request(f"{strength!r} is no strength for the LoRA {name}.", f'Write a number: "{name}:0.8".')
    known = ", ".join(lora.name for lora in card.loras) or "none"
    raise bad_request(f"There is no LoRA {file!r}.", f"Give a .safetensors file, or one the model brings: {known}.")


def _known_lora(file: str, card: ModelCard) -> Path | None:
    for lora in card.loras:
        if file.casefold() in (
            lora.name.casefold(),
            Path(lora.file).name.casefold(),
            Path(lora.file).stem.casefold(),
        ):
            return Path(lora.file)
    path = named_path(file)
    if path.is_file():
        return path.absolute()
    return next((one for one in comfy_files("lora") if file in (one.name, one.stem)), None)
