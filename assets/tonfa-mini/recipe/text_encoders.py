"""Small T5 and CLIP text encoders, taught first by matching captions with pictures (Radford et al. 2021)."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from recipe.image_towers import ImageTower, Judge, judge_loss
from recipe.optimisers import Countdown, LearningRates, Optimiser, warm_stable_decay
from recipe.parallel import autocast, channels_last, eager
from recipe.rasteriser import SceneBatch, rasterise
from recipe.settings import Settings
from recipe.sprites import SpriteBank
from recipe.tokens import END_ID, LENGTH, PAD_ID


class TextEncoders(nn.Module):
    """tokens (B, 32) -> T5's states (B, 32, W) for the context, CLIP's state at </s> (B, W) for the modulation."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        width, heads = settings.text_width, settings.text_width // 64
        self.t5: Any = T5EncoderModel(
            T5Config(
                vocab_size=settings.vocab_size, d_model=width, d_kv=64, num_heads=heads, d_ff=3 * width,
                num_layers=settings.t5_layers, feed_forward_proj="gated-gelu", dropout_rate=0.0,
                pad_token_id=PAD_ID, eos_token_id=END_ID,
            )
        )  # fmt: skip
        self.clip: Any = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=settings.vocab_size, hidden_size=width, intermediate_size=4 * width,
                num_hidden_layers=settings.clip_layers, num_attention_heads=heads, max_position_embeddings=LENGTH,
                hidden_act="quick_gelu", bos_token_id=PAD_ID, eos_token_id=END_ID, pad_token_id=PAD_ID,
            )
        )  # fmt: skip
        for module in self.modules():
            if isinstance(module, nn.Embedding) and module.num_embeddings == settings.vocab_size:
                nn.init.normal_(module.weight, std=0.3)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.t5(input_ids=tokens).last_hidden_state, self.clip(input_ids=tokens).pooler_output


def null_tokens(tokens: Tensor) -> Tensor:
    """The empty prompt, as often as there are rows."""
    empty = torch.zeros_like(tokens)
    empty[:, 0] = END_ID
    return empty


def mean_over_words(states: Tensor, tokens: Tensor) -> Tensor:
    mask = (tokens != PAD_ID).float()[..., None]
    return (states * mask).sum(1) / mask.sum(1).clamp(min=1)


def contrastive_loss(pictures: Tensor, texts: Tensor, swapped: Tensor, has_swap: Tensor, scale: Tensor) -> Tensor:
    """CLIP's loss both ways; a picture of two things also has to reject its caption with the things swapped."""
    logits = scale.exp().clamp(max=100) * pictures @ texts.T
    hard = scale.exp().clamp(max=100) * (pictures * swapped).sum(1, keepdim=True)
    hard = hard.masked_fill(~has_swap[:, None], -1e4)
    target = torch.arange(len(logits), device=logits.device)
    forward = F.cross_entropy(torch.cat([logits, hard], 1), target)
    return 0.5 * (forward + F.cross_entropy(logits.T, target))


class ContrastivePair(nn.Module):
    """Both text encoders beside one image tower."""

    def __init__(self, settings: Settings, num_concepts: int) -> None:
        super().__init__()
        self.encoders = TextEncoders(settings)
        self.tower = ImageTower(num_concepts, (64, 96, 160, 256), settings.judge_px)
        self.from_t5 = nn.Linear(settings.text_width, self.tower.width)
        self.from_clip = nn.Linear(settings.text_width, self.tower.width)
        self.scales = nn.Parameter(torch.tensor([2.7, 2.7]))

    def embed(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        states, pooled = self.encoders(tokens)
        t5 = F.normalize(self.from_t5(mean_over_words(states, tokens)).float(), dim=-1)
        return t5, F.normalize(self.from_clip(pooled).float(), dim=-1)

    def loss(self, pictures: Tensor, scenes: SceneBatch, concepts: Tensor) -> Tensor:
        classes, image = self.tower(pictures)
        has_swap = scenes.swapped[:, 0] != PAD_ID
        texts = self.embed(scenes.tokens.long())
        swapped = self.embed(scenes.swapped.long())
        total = 0.5 * F.cross_entropy(classes.float(), concepts)
        for scale, text, other in zip(self.scales, texts, swapped, strict=True):
            total = total + contrastive_loss(image, text, other, has_swap, scale)
        return total


def split_parameters(named: Iterable[tuple[str, nn.Parameter]]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices inside blocks for Muon; embeddings, heads, first layers and vectors for AdamW."""
    outside = ("embed", "shared", "relative", "classes", "stem", "position")
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, p in named:
        (others if p.ndim < 2 or any(word in name for word in outside) else matrices).append(p)
    return matrices, others


def train_text(
    bank: SpriteBank, scenes: SceneBatch, held_out: SceneBatch, num_concepts: int, settings: Settings, until: float,
    work: Path,
) -> None:  # fmt: skip
    """Train the encoders, and beside them the judge (other seed, own towers). Writes text.pt, judge.pt, .json."""
    torch.manual_seed(2)
    device = scenes.rows.device
    pair = channels_last(ContrastivePair(settings, num_concepts), device)
    torch.manual_seed(77)
    judge = channels_last(Judge(num_concepts, settings), device)
    if device.type == "cuda":
        for module in (pair.tower, judge.tower):
            module.compile(dynamic=False)
    matrices, others = split_parameters([*pair.named_parameters(), *judge.named_parameters()])
    optimiser = Optimiser(matrices, others, LearningRates(muon=2e-3, adam=2e-3), weight_decay=0.02)

    def step(scale: float) -> tuple[Tensor, Tensor]:
        batch = scenes.sample(settings.contrastive_batch)
        pictures = rasterise(bank, batch, settings.judge_px)
        pictures = pictures + 0.03 * torch.rand(len(pictures), 1, 1, 1, device=device) * torch.randn_like(pictures)
        if torch.rand(()) < 0.25:  # the judge has to bear soft pictures
            soft = F.avg_pool2d(pictures, 2)
            pictures = F.interpolate(soft, size=pictures.shape[-2:], mode="bilinear", align_corners=False)
        concepts = concept_shares(batch.concepts, num_concepts)
        with autocast(device):
            ours, theirs = pair.loss(pictures, batch, concepts), judge_loss(judge, pictures, batch, concepts)
        (ours + theirs).backward()
        optimiser.step(scale)
        return ours.detach(), theirs.detach()

    begun = time.time()
    step(1e-6)
    print(f"text: first step after {time.time() - begun:.0f} s", flush=True)
    countdown = Countdown(until)
    for done in countdown:
        ours, theirs = step(warm_stable_decay(done, 0.02, 0.6))
        if countdown.steps % 100 == 0:
            rate = countdown.steps * settings.contrastive_batch / max(countdown.elapsed_s, 1e-3)
            print(
                f"text: step {countdown.steps} {ours.item():.3f}, judge {theirs.item():.3f}, {rate:.0f}/s",
                flush=True,
            )
    pair.eval()
    judge.eval()
    torch.save(pair.encoders.state_dict(), work / "text.pt")
    torch.save(judge.state_dict(), work / "judge.pt")
    with eager():
        report = evaluate_matching(pair, judge, bank, held_out, settings) | {"steps": float(countdown.steps)}
    (work / "text.json").write_text(json.dumps(report))
    print("text:", report, flush=True)


def concept_shares(concepts: Tensor, num_concepts: int) -> Tensor:
    """(B, layers) concept numbers, -1 = none -> (B, num_concepts) shares that sum to 1."""
    index = torch.where(concepts < 0, num_concepts, concepts.long())
    shares = torch.zeros(len(index), num_concepts + 1, device=index.device).scatter_(1, index, 1.0)[
        :, :num_concepts
    ]
    return shares / shares.sum(1, keepdim=True).clamp(min=1)


@torch.no_grad()
def evaluate_matching(
    pair: ContrastivePair, judge: Judge, bank: SpriteBank, scenes: SceneBatch, settings: Settings
) -> dict[str, float]:
    """On held-out scenes: the judge's answers for single things, and how often order is told apart."""
    batch = scenes.at(torch.arange(min(1024, len(scenes)), device=scenes.rows.device))
    with autocast(batch.rows.device):
        pictures = rasterise(bank, batch, settings.judge_px)
        classes, image = judge(pictures)
        texts = judge.text(batch.tokens.long())
        _, ours = pair.tower(pictures)
        right, wrong = pair.embed(batch.tokens.long()), pair.embed(batch.swapped.long())
    group = min(256, len(batch))
    hits = [
        (image[i : i + group] @ texts[i : i + group].T).argmax(1) == torch.arange(group, device=image.device)
        for i in range(0, len(batch) - group + 1, group)
    ]
    single = (batch.concepts >= 0).sum(1) == 1
    label = batch.concepts.max(1).values.long()
    two = batch.swapped[:, 0] != PAD_ID
    order = [
        ((ours * r).sum(1) > (ours * w).sum(1))[two].float().mean().item()
        for r, w in zip(right, wrong, strict=True)
    ]
    return {
        "judge_retrieval_of_256": torch.cat(hits).float().mean().item(),
        "judge_top1_singles": (classes.argmax(1) == label)[single].float().mean().item(),
        "t5_tells_order": order[0],
        "clip_tells_order": order[1],
    }


def load_text(encoders: TextEncoders, path: Path) -> None:
    state = torch.load(path, map_location="cpu", weights_only=True)
    encoders.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
