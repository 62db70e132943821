"""The stages of the recipe: `python -m recipe STAGE --work FOLDER`. README.md says in which order."""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import replace
from pathlib import Path

import torch

from recipe import parallel
from recipe.dataset import Catalogue, fit_tokenizer, read_scenes, write_scenes
from recipe.rasteriser import SceneBatch, to_device
from recipe.settings import REAL, TOY, Settings
from recipe.sprites import SpriteBank, load_bank
from recipe.waiting import wait_for

READY = "ready"


def main() -> None:
    parser = argparse.ArgumentParser(prog="recipe", description=__doc__)
    parser.add_argument("stage", choices=sorted(STAGES))
    parser.add_argument("--work", type=Path, required=True, help="folder of everything made")
    parser.add_argument("--downloads", type=Path, default=Path("downloads"), help="unpacked npm packages")
    parser.add_argument("--until", type=float, default=0.0, help="time of day (Unix seconds) to stop training")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of training where --until is not given")
    parser.add_argument("--patience", type=float, default=1800.0, help="seconds to wait for another stage's file")
    parser.add_argument("--base", default="distilled", help="what the LoRA is trained on: distilled or base")
    parser.add_argument("--toy", action="store_true", help="toy sizes, for a processor")
    parser.add_argument("--scenes", type=int, default=0, help="number of scenes, instead of the setting")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    settings = TOY if args.toy else REAL
    if args.scenes:
        settings = replace(settings, scenes=args.scenes)
    args.until = args.until or time.time() + args.seconds
    STAGES[args.stage](args, settings)


def fetch(args: argparse.Namespace, settings: Settings) -> None:
    from recipe.sources import fetch as fetch_packages

    fetch_packages(args.downloads)


def bundle(args: argparse.Namespace, settings: Settings) -> None:
    """--work is the folder of the finished model."""
    from recipe.bundle import write_bundle

    write_bundle(args.work)


def compact(args: argparse.Namespace, settings: Settings) -> None:
    """--work holds the LoRA in 16 bits; lora-3d.safetensors appears beside it."""
    from recipe.compact_lora import compact_lora

    error = compact_lora(args.work / "lora_distilled.safetensors", args.work / "lora-3d.safetensors")
    print(f"compact: relative error {error:.4f}")


def prepare(args: argparse.Namespace, settings: Settings) -> None:
    """Drawings, tokenizer (kept if it is there) and scenes; then the file that the other stages wait for."""
    from recipe.render import render_all

    workers = os.cpu_count() or 1
    begun = time.time()
    if not (args.work / "artworks.npy").exists():
        render_all(args.downloads, args.work, settings.sprite_px, workers)
        print(f"prepare: drawn after {time.time() - begun:.0f} s", flush=True)
    if not (args.work / "tokenizer.json").exists():
        fit_tokenizer(args.work, min(120_000, 100 * settings.scenes))
    write_scenes(args.work, settings.scenes, workers)
    (args.work / READY).touch()
    print(f"prepare: scenes after {time.time() - begun:.0f} s", flush=True)


def _data(args: argparse.Namespace, device: torch.device) -> tuple[Catalogue, SpriteBank, SceneBatch, SceneBatch]:
    wait_for(args.work / READY, time.time() + args.patience)
    begun = time.time()
    catalogue = Catalogue.load(args.work)
    bank = load_bank(args.work, catalogue, device)
    scenes = [to_device(read_scenes(args.work, held_out), device) for held_out in (False, True)]
    print(f"{args.stage}: data after {time.time() - begun:.0f} s", flush=True)
    return catalogue, bank, scenes[0], scenes[1]


def autoencoder(args: argparse.Namespace, settings: Settings) -> None:
    from recipe.autoencoder import train_autoencoder

    _, _, device = parallel.start()
    _, bank, scenes, held_out = _data(args, device)
    train_autoencoder(bank, scenes, held_out, settings, args.until, args.work)


def text(args: argparse.Namespace, settings: Settings) -> None:
    from recipe.text_encoders import train_text

    _, _, device = parallel.start()
    catalogue, bank, scenes, held_out = _data(args, device)
    train_text(bank, scenes, held_out, len(catalogue.concepts), settings, args.until, args.work)


def transformer(args: argparse.Namespace, settings: Settings) -> None:
    """flow, distil, lora and report: what follows the autoencoder and the text encoders."""
    from recipe.autoencoder import load_autoencoder
    from recipe.evaluate import Evaluation
    from recipe.flow import Stage, compile_for_flow, train_flow
    from recipe.guidance import distil
    from recipe.image_towers import load_judge
    from recipe.lora import train_lora
    from recipe.prompted_flux import PromptedFlux
    from recipe.report import write_report
    from recipe.text_encoders import TextEncoders, load_text

    rank, _, device = parallel.start(str(args.work.resolve() / f"rendezvous_{args.stage}"))
    model = PromptedFlux(settings, TextEncoders(settings)).to(device)
    if args.stage == "flow":  # compiled while the data is still being made
        compile_for_flow(model, settings.small_px, settings.small_batch, device)
    catalogue, bank, scenes, held_out = _data(args, device)
    give_up = time.time() + args.patience
    for name in ("autoencoder.pt", "text.pt", "judge.pt"):
        wait_for(args.work / name, give_up)
    encoder = load_autoencoder(args.work / "autoencoder.pt", settings, device)
    load_text(model.text, args.work / "text.pt")
    stage = Stage(settings, bank, scenes, encoder, device, rank, args.work, args.until)
    if args.stage == "flow":
        train_flow(stage, model)
        return
    if args.stage == "distil":
        distil(stage, model, give_up)
        return
    judge = load_judge(args.work / "judge.pt", len(catalogue.concepts), settings, device)
    evaluation = Evaluation(catalogue, bank, judge, settings, args.work)
    if args.stage == "lora":
        train_lora(stage, model, catalogue, evaluation, args.base, give_up)
    else:
        write_report(stage, model, catalogue, evaluation, held_out, give_up)


def warm(args: argparse.Namespace, settings: Settings) -> None:
    """Compile what `flow` and `distil` need later, into the cache on disk that all processes share."""
    from recipe.autoencoder import Autoencoder
    from recipe.flow import compile_for_flow
    from recipe.guidance import compile_for_distillation
    from recipe.prompted_flux import PromptedFlux
    from recipe.text_encoders import TextEncoders

    _, _, device = parallel.start()
    if device.type != "cuda":
        return
    begun = time.time()
    model = PromptedFlux(settings, TextEncoders(settings)).to(device)
    compile_for_flow(model, settings.picture_px, settings.batch, device)
    print(f"warm: flow after {time.time() - begun:.0f} s", flush=True)
    network = parallel.channels_last(Autoencoder(settings), device).eval().requires_grad_(False)
    network.network.encoder.compile(dynamic=False)
    for px, batch in ((settings.small_px, settings.small_batch), (settings.picture_px, settings.batch)):
        network.encode(torch.rand(batch, 3, px, px, device=device))
    print(f"warm: encoder after {time.time() - begun:.0f} s", flush=True)
    compile_for_distillation(model, model.twin().requires_grad_(False), settings, device)
    print(f"warm: distillation after {time.time() - begun:.0f} s", flush=True)


STAGES = {
    "bundle": bundle,
    "compact": compact,
    "fetch": fetch, "prepare": prepare, "autoencoder": autoencoder, "text": text, "flow": transformer,
    "distil": transformer, "lora": transformer, "report": transformer, "warm": warm,
}  # fmt: skip

if __name__ == "__main__":
    main()
