"""The scale of what a GELU, fused into fc1, hands to fc2 as e4m3: fixed before the row is known.

docs/decisions/0007-the-scale-of-a-fused-gelu.md has the measurements.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.reference.quantize_act import E4M3_MAX
from engine.reference.svdq_linear import SVDQuantWeights

GELU_DEPTH = 0.17  # GELU is never below -0.17
# Of the bound below. Rows reach a sixteenth to a hundredth of it in Tonfa Mini, a 150th at FLUX's width, and e4m3
# loses nothing as long as a row's largest value is at least a 500th of what its scale has room for.
SHARE_OF_BOUND = 0.25


def gelu_reach(fc1: SVDQuantWeights) -> Tensor:
    """(2, N) fp32: how far fc1's channels go where the largest smoothed input is 1, and without any input.

    |y_n| <= sum_k |W_nk c_k| * max_k |x_k / c_k| + b_n; W holds the low-rank branch, c smooths fc1's input.
    """
    weight, bias = fc1.dense()
    per_input = (weight * fc1.smooth_factor.float()).abs_().sum(dim=1)
    without = torch.full_like(per_input, GELU_DEPTH)
    return torch.stack([per_input, without if bias is None else torch.maximum(bias, without)])


def fused_gelu_scale(reach: Tensor, fc2_smooth: Tensor) -> tuple[float, float]:
    """row_slope and row_offset of `GeluQuantize`: a row's scale for fc2 is slope * its scale for fc1 + offset.

    reach: of fc1, from `gelu_reach`; fc2_smooth: (N,). fc1 reads e4m3: its row scale is max |x / c| / 448.
    """
    per_input, without = (reach / fc2_smooth.float()).amax(dim=1).tolist()
    return SHARE_OF_BOUND * per_input, without / E4M3_MAX
