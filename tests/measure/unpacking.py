"""How fast packed layers become plain codes: python -m tests.measure.unpacking [cpu|cuda]

FLUX.1 has 8.8 G codes in SVDQuant layers and 3.2 G in modulations. Prints, for one layer of each sort, the median
of repeated runs: milliseconds, GB/s of packed bytes read, G codes/s, and what all of FLUX.1 would take.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from engine.checkpoints import svdquant_layout as layout

REPEATS = 15


def median_s(work: Callable[[], Tensor], device: str) -> float:
    times = []
    for _ in range(REPEATS + 2):
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def main() -> None:
    device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {device}, {where}")
    n, k, rows = 12288, 3072, 18432
    qweight = torch.randint(-128, 128, (n, k // 2), dtype=torch.int8, device=device)
    awq = torch.randint(-(2**31), 2**31 - 1, (rows // 4, k // 2), dtype=torch.int32, device=device)
    codes = layout.unpack_qweight(qweight, signed=True)
    scales = torch.rand(k // 64, n, device=device).bfloat16()
    down = torch.rand(k, 32, device=device).bfloat16()
    rates = {}
    for name, work, num_codes, num_bytes in (
        ("unpack_qweight 12288 x 3072", lambda: layout.unpack_qweight(qweight, signed=True), n * k, qweight.nbytes),
        ("pack_qweight 12288 x 3072", lambda: layout.pack_qweight(codes), n * k, qweight.nbytes),
        ("unpack_awq 18432 x 3072", lambda: layout.unpack_awq(awq), rows * k, awq.nbytes),
        ("unpack_wscales_int4", lambda: layout.unpack_wscales_int4(scales), 0, scales.nbytes),
        ("unpack_proj_down rank 32", lambda: layout.unpack_proj_down(down), 0, down.nbytes),
    ):
        seconds = median_s(work, device)
        rates[name.split()[0]] = num_codes / seconds
        print(f"{name:28} {seconds * 1e3:8.2f} ms {num_bytes / seconds / 1e9:8.2f} GB/s packed", end="")
        print(f" {num_codes / seconds / 1e9:8.2f} G codes/s" if num_codes else "")
    print(f"all of FLUX.1: {8.8e9 / rates['unpack_qweight'] + 3.2e9 / rates['unpack_awq']:.1f} s")


if __name__ == "__main__":
    main()
