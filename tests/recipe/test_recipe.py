"""What the recipe promises about its captions, its pictures and its files."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from recipe.autoencoder import mosaic
from recipe.concepts import Concept
from recipe.dataset import Catalogue, pack
from recipe.english import plural, with_article
from recipe.latents import image_ids, pack_latents, unpack_latents
from recipe.lora import attach, lora_state, save_lora
from recipe.optimisers import Muon, orthogonalise, warm_stable_decay
from recipe.palette import FLAT, NOTO_STYLE, STYLES, TINTS
from recipe.prompted_flux import PromptedFlux
from recipe.rasteriser import rasterise, to_device
from recipe.sampling import sigmas
from recipe.scenes import RELATIONS, Backdrop, Drawing, Scene, SceneSampler
from recipe.settings import TOY
from recipe.sprites import SpriteBank, tint
from recipe.text_encoders import TextEncoders
from recipe.tokens import END_ID, LENGTH, PAD_ID, encode, train_tokenizer

from engine.lora import LoraStack

CONCEPTS = (
    Concept("1f98a", (("fox", 4.0),), "animals", "animal-mammal", 2.5),
    Concept("1f34e", (("red apple", 4.0), ("apple", 3.0)), "food", "food-fruit", 2.5),
    Concept("1f9ca", (("ice", 4.0),), "food", "drink", 1.0),
)


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    artworks = tuple((style, c.key) for style in STYLES for c in CONCEPTS)
    tinted = tuple((c.key, t) for c in CONCEPTS[:1] for t in TINTS)
    names: list[tuple[str, str, str | int | None]] = [(style, key, None) for style, key in artworks]
    names += [(FLAT, key, t) for key, t in tinted]
    rows = {name: row for row, name in enumerate(names)}
    return Catalogue(CONCEPTS, artworks, tinted, rows, {c.key: i for i, c in enumerate(CONCEPTS)})


def test_articles_and_plurals() -> None:
    assert [with_article(w) for w in ("fox", "owl", "unicorn", "glasses")] == [
        "a fox", "an owl", "a unicorn", "glasses"]  # fmt: skip
    assert [plural(w) for w in ("fox", "cherry", "toy", "mouse", "red car")] == [
        "foxes", "cherries", "toys", "mice", "red cars"]  # fmt: skip


def words_of(caption: str) -> list[str]:
    return sorted(w for w in caption.replace(",", "").split() if w not in ("a", "an"))


def test_captions_name_what_the_scene_holds() -> None:
    sampler = SceneSampler(CONCEPTS, seed=3, noto_share=0.3)
    for _ in range(500):
        scene = sampler.sample()
        assert 1 <= len(scene.drawings) <= 6
        assert ("noto style" in scene.caption) == (scene.drawings[0].style == NOTO_STYLE)
        for d in scene.drawings:
            assert d.tint is None or d.tint in scene.caption
        if scene.swapped:
            assert words_of(scene.swapped) == words_of(scene.caption) != []
            assert scene.swapped != scene.caption
        words = [w for words, _, _ in RELATIONS.values() for w in words if f" {w} a" in scene.caption]
        if words and scene.swapped and ("left" in words[0] or "right" in words[0]):
            first, second = scene.drawings
            assert (first.x < second.x) == ("left" in words[0])


def test_every_word_of_the_captions_is_one_token_and_new_words_are_spelled(tmp_path: Path) -> None:
    sampler = SceneSampler(CONCEPTS, seed=1)
    tokenizer = train_tokenizer([sampler.sample().caption for _ in range(400)], vocab_size=600)
    assert tokenizer.encode("a red apple").tokens == ["▁a", "▁red", "▁apple", "</s>"]
    ids = encode(tokenizer, ["a fox", "", "zebra " * 40])
    assert ids.shape == (3, LENGTH)
    assert ids[0, 2] == END_ID
    assert (ids[0, 3:] == PAD_ID).all()
    assert ids[1].tolist() == [END_ID] + [PAD_ID] * (LENGTH - 1)
    assert ids[2, -1] == END_ID


def test_a_drawing_lands_where_the_scene_says_and_a_bare_scene_is_white(catalogue: Catalogue) -> None:
    artworks = np.zeros((len(catalogue.artworks), 32, 32, 4), np.uint8)
    artworks[..., 0] = artworks[..., 3] = 255  # red squares
    bank = SpriteBank.__new__(SpriteBank)
    bank.size_px = 32
    pixels = torch.from_numpy(artworks).permute(0, 3, 1, 2).float() / 255
    bank.levels = [(torch.nn.functional.avg_pool2d(pixels, 2**i) * 255).to(torch.uint8) for i in range(4)]
    scene = Scene("", (Drawing(CONCEPTS[0].key, FLAT, 0.25, 0.75, 0.25),), Backdrop())
    arrays = pack([scene], catalogue, random.Random(0))
    arrays["tokens"] = arrays["swapped"] = np.zeros((1, LENGTH), np.int16)
    picture = rasterise(bank, to_device(arrays, torch.device("cpu")), 64)[0]
    assert picture[:, 48, 16].tolist() == pytest.approx([1, 0, 0], abs=0.01)
    assert picture[:, 16, 48].tolist() == pytest.approx([1, 1, 1], abs=0.01)
    assert (picture[1] < 0.5).float().mean().item() == pytest.approx(0.25**2, abs=0.01)


def test_a_tint_turns_the_hue_and_keeps_the_shape() -> None:
    red = torch.zeros(1, 4, 8, 8)
    red[:, 0], red[:, 3] = 0.8, 1.0
    blue = tint(red, torch.tensor([2 / 3]))
    assert blue[0, :3, 0, 0].tolist() == pytest.approx([0, 0, 0.8], abs=1e-4)
    assert torch.equal(blue[:, 3], red[:, 3])


def test_packing_is_undone_and_full_pictures_have_whole_places() -> None:
    latents = torch.randn(2, 16, 8, 8)
    assert torch.equal(unpack_latents(pack_latents(latents)), latents)
    assert image_ids(64, 64, torch.device("cpu"))[5].tolist() == [0, 1, 1]
    assert image_ids(32, 64, torch.device("cpu"))[0].tolist() == [0, 0.5, 0.5]


def test_a_mosaic_holds_four_maps_at_half_size() -> None:
    maps = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 8, 8)
    assert mosaic(maps)[0, 0, ::4, ::4].tolist() == [[0, 1], [2, 3]]


def test_sigmas_go_from_one_to_zero_and_the_schedule_ends_low() -> None:
    assert sigmas(4, 1.0) == [1, 0.75, 0.5, 0.25, 0]
    assert sigmas(4, 3.0)[2] == pytest.approx(0.75)
    assert warm_stable_decay(0.3) == 1
    assert warm_stable_decay(0.999) == pytest.approx(0.01)


def test_muon_steps_are_near_orthogonal_and_treat_stacked_matrices_apart() -> None:
    torch.manual_seed(0)
    u = orthogonalise(torch.randn(2, 16, 32))
    singular = torch.linalg.svdvals(u)
    assert 0.6 < singular.min() < singular.max() < 1.3
    p = torch.nn.Parameter(torch.zeros(48, 16))
    p.grad = torch.randn(48, 16)
    p.grad[16:] *= 1000
    Muon([p], lr=1.0, weight_decay=0.0).step(1.0)
    sizes = [part.norm().item() for part in p.data.chunk(3)]
    assert max(sizes) / min(sizes) < 1.2


def test_the_engine_reads_the_lora_as_it_was_trained(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = PromptedFlux(TOY, TextEncoders(TOY))
    for p in model.flux.parameters():  # a fresh network answers 0 to everything
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.05)
    plain = model.twin()
    branches = attach(model.flux, rank=4)
    for branch in branches.values():
        torch.nn.init.normal_(branch.up, std=0.1)
        branch.down.data = branch.down.data.bfloat16().float()
        branch.up.data = branch.up.data.bfloat16().float()
    save_lora(lora_state(model.flux, branches), tmp_path / "lora.safetensors")
    stack = LoraStack(plain.flux)
    report = stack.set([(tmp_path / "lora.safetensors", 1.0)])[0]
    assert not report.keys_unused
    inputs = (
        torch.randn(2, 16, 64),
        torch.tensor([0.3, 0.9]),
        torch.ones(2),
        torch.randn(2, 32, 64),
        torch.randn(2, 64),
    )
    with torch.no_grad():
        torch.testing.assert_close(plain(*inputs), model(*inputs), rtol=1e-4, atol=1e-4)
