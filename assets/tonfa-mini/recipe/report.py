"""The last stage: export, sheets, and every gate that can be measured on 16-bit weights."""

from __future__ import annotations

import json
import shutil
from itertools import product

from recipe.dataset import Catalogue
from recipe.evaluate import Evaluation
from recipe.export import (
    check_places,
    export_autoencoder,
    export_text,
    export_transformer,
    fit_preview,
    write_texts,
)
from recipe.flow import Stage
from recipe.prompted_flux import PromptedFlux, load_model
from recipe.prompts import SHOWN
from recipe.rasteriser import SceneBatch
from recipe.sampling import Sampler
from recipe.waiting import wait_for


def write_report(
    stage: Stage, model: PromptedFlux, catalogue: Catalogue, evaluation: Evaluation, held_out: SceneBatch,
    give_up: float,
) -> None:  # fmt: skip
    """Wait for distilled.pt; then everything into the folder `out`, weights first, numbers as they come."""
    out = stage.work / "out"
    out.mkdir(exist_ok=True)
    check_places(stage.settings)
    model.eval()
    report: dict[str, object] = {"ceiling": evaluation.ceiling()}
    export_autoencoder(stage.autoencoder, out)
    write_texts(catalogue, fit_preview(stage.autoencoder, stage.bank, held_out, stage.settings), out)
    shutil.copy(stage.work / "tokenizer.json", out / "tokenizer.json")
    wait_for(stage.work / "distilled.pt", give_up)
    load_model(model, stage.work / "distilled.pt")
    export_transformer(model, out)
    export_text(model, out)
    (out / "exported").touch()

    def note(name: str, value: object) -> None:
        report[name] = value
        (out / "evaluation.json").write_text(json.dumps(report, indent=1))
        print("report:", name, json.dumps(value), flush=True)

    best = Sampler(guidance=3.5)
    evaluation.show(model, stage.autoencoder, SHOWN, best, out / "sheet.png", cell_px=stage.settings.picture_px)
    note("distilled guidance 3.5 shift 2", evaluation.full(model, stage.autoencoder, best))
    evaluation.show_beside_truth(model, stage.autoencoder, best, out / "beside_truth.png")
    evaluation.free(model, stage.autoencoder, best, out / "free.png")
    sweep = [Sampler(guidance=g, shift=s) for g, s in product((1.0, 2.0, 3.0, 4.5), (2.0, 3.0))]
    sweep += [Sampler(steps=n, guidance=3.0) for n in (4, 24)]
    note("distilled sweep", evaluation.sweep(model, stage.autoencoder, sweep))
    load_model(model, stage.work / "base.pt")
    note("base cfg 2.5 shift 2", evaluation.full(model, stage.autoencoder, Sampler(cfg=2.5)))
    evaluation.show(model, stage.autoencoder, SHOWN, Sampler(cfg=2.5), out / "sheet_base.png")
