"""svdq_linear: a linear whose weight is a 4-bit residual plus a 16-bit low-rank branch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from engine.reference.e2m1 import decode_e2m1

Precision = Literal["int4", "nvfp4"]
GROUP_SIZE: dict[Precision, int] = {"int4": 64, "nvfp4": 16}
HALF_TYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, eq=False)
class SVDQuantWeights:
    """The weights of one quantized linear: logical order, without padding, on any device.

    N out channels, K in channels, R rank, G group size (64 for int4, 16 for nvfp4), h bf16, fp16 or fp32:

        y = wcscales * (wtscale * quantized((x + input_shift) / smooth_factor) @ (codes * wscales).T) + bias
            + (x @ proj_down) @ proj_up.T

    The low-rank branch sees x as it is: neither shifted nor smoothed. Source: the public SVDQuant file format.
    Raises ValueError when shapes or dtypes do not fit together.
    """

    precision: Precision
    codes: Tensor  # (N, K) int8 -8..7 for int4; uint8 e2m1 codes 0..15 for nvfp4
    wscales: Tensor  # (N, K/G) h for int4, float8_e4m3fn for nvfp4
    smooth_factor: Tensor  # (K,) h, x is divided by it
    bias: Tensor | None  # (N,) h as stored: with input_shift != 0 it holds the correction for that shift
    proj_down: Tensor  # (K, R) h
    proj_up: Tensor  # (N, R) h
    wtscale: Tensor | None = None  # () fp32, one scale for the whole residual
    wcscales: Tensor | None = None  # (N,) h, one scale per out channel
    input_shift: float = 0.0  # 11/64 for what follows a GELU in int4 files, else 0; the family knows

    def __post_init__(self) -> None:
        if self.precision not in GROUP_SIZE:
            raise ValueError(f"SVDQuantWeights: no precision {self.precision!r}")
        if self.codes.ndim != 2 or self.codes.shape[1] % self.group_size:
            raise ValueError(
                f"SVDQuantWeights: codes must be (N, K) with K a multiple of {self.group_size}, "
                f"got {tuple(self.codes.shape)}"
            )
        n, k, rank = self.out_features, self.in_features, self.proj_down.shape[-1]
        for name, tensor, shape in (
            ("wscales", self.wscales, (n, k // self.group_size)),
            ("smooth_factor", self.smooth_factor, (k,)),
            ("bias", self.bias, (n,)),
            ("proj_down", self.proj_down, (k, rank)),
            ("proj_up", self.proj_up, (n, rank)),
            ("wtscale", self.wtscale, ()),
            ("wcscales", self.wcscales, (n,)),
        ):
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"SVDQuantWeights: {name} must be {shape}, got {tuple(tensor.shape)}")
        int4 = self.precision == "int4"
        code_type, scale_types = (torch.int8, HALF_TYPES) if int4 else (torch.uint8, (torch.float8_e4m3fn,))
        if self.codes.dtype != code_type or self.wscales.dtype not in scale_types:
            raise ValueError(
                f"SVDQuantWeights: {self.precision} takes {code_type} codes with scales in {scale_types}, "
                f"got {self.codes.dtype} and {self.wscales.dtype}"
            )

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes.shape[1]

    @property
    def rank(self) -> int:
        return self.proj_down.shape[1]

    @property
    def group_size(self) -> int:
        return GROUP_SIZE[self.precision]

    def residual(self) -> Tensor:
        """(N, K) fp32: codes x wscales x wtscale x wcscales, acting on the shifted and smoothed input."""
        values = self.codes.float() if self.precision == "int4" else decode_e2m1(self.codes)
        groups = values.view(self.out_features, -1, self.group_size)
        residual = (groups * self.wscales.float().unsqueeze(-1)).view_as(values)
        if self.wtscale is not None:
            residual = residual * self.wtscale.float()
        if self.wcscales is not None:
            residual = residual * self.wcscales.float().unsqueeze(-1)
        return residual

    def dense(self) -> tuple[Tensor, Tensor | None]:
        """The 16-bit linear this one stands for: weight (N, K) fp32 with the low-rank branch, bias (N,) fp32.

        The bias is the one for the unshifted input: the correction for `input_shift` is taken out.
        """
        unsmoothed = self.residual() / self.smooth_factor.float()
        weight = unsmoothed + self.proj_up.float() @ self.proj_down.float().T
        if self.input_shift == 0:
            return weight, None if self.bias is None else self.bias.float()
        correction = self.input_shift * unsmoothed.sum(dim=1)
        return weight, correction if self.bias is None else self.bias.float() + correction
