"""A LoRA in half the bytes: both factors balanced, then stored in 8 bits (e4m3), the common scale in `alpha`.

For a module of rank R the product up @ down is kept (SVD: U sqrt(S), sqrt(S) V^T), so that no factor's numbers are
so small that e4m3 has few steps left for them. Each factor is multiplied by 2^k, which alpha / R takes back.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LARGEST = 240.0  # half of what e4m3 holds


def balanced(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """down (R, K), up (N, R) -> the same product, each rank shared equally between the factors; fp64."""
    q_down, r_down = torch.linalg.qr(down.double().T)  # (K, R), (R, R)
    q_up, r_up = torch.linalg.qr(up.double())  # (N, R), (R, R)
    u, s, vt = torch.linalg.svd(r_up @ r_down.T)
    root = s.sqrt()
    return (q_down @ vt.T * root).T, q_up @ u * root


def compact_lora(source: Path, out: Path) -> float:
    """Write `source` (bf16, diffusers' names) to `out` in e4m3; returns the relative error of all products."""
    state = load_file(str(source))
    compact: dict[str, Tensor] = {}
    wrong = whole = 0.0
    for key in [key for key in state if key.endswith(".lora_A.weight")]:
        module = key.removesuffix(".lora_A.weight")
        down, up = state[key], state[f"{module}.lora_B.weight"]
        rank = down.shape[0]
        parts = {}
        exponents = 0
        for name, factor in zip(("lora_A", "lora_B"), balanced(down, up), strict=True):
            exponent = math.floor(math.log2(LARGEST / max(float(factor.abs().max()), 1e-30)))
            exponents += exponent
            parts[name] = (factor * 2.0**exponent).float().to(torch.float8_e4m3fn).contiguous()
            compact[f"{module}.{name}.weight"] = parts[name]
        alpha = torch.tensor(rank * 2.0**-exponents)
        compact[f"{module}.alpha"] = alpha
        product = up.double() @ down.double()
        kept = parts["lora_B"].double() @ parts["lora_A"].double() * (float(alpha) / rank)
        wrong += float((kept - product).square().sum())
        whole += float(product.square().sum())
    save_file(compact, str(out), metadata={"format": "pt"})
    return math.sqrt(wrong / whole)
