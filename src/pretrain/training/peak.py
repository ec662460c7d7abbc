"""Peak FLOP/s of a device, against which the utilisation of a run is counted."""

from __future__ import annotations

import math
import time

import torch

from pretrain.training.precision import Precision

__all__ = ["peak_flops"]

# Dense bf16/fp16 peaks from the vendors' data sheets, FLOP/s.
_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "T4": 65e12}
_PEAK_SECONDS = 60.0  # between two measurements of peak FLOP/s, which take about 0.1 s
_LONG_ENOUGH = 0.01  # seconds of a product whose speed is measured
# (device, type, threads) -> best FLOP/s measured in this process, and the time of the last measurement.
_peaks_seen: dict[tuple[str, str, int], tuple[float, float]] = {}


def peak_flops(precision: Precision) -> float:
    """Return the peak FLOP/s of the device in this type: from the data sheet for known GPUs, else measured.

    On a busy machine a measurement is too low, so it is repeated from time to time, and the best one of this process
    is used.
    """
    if precision.device.type == "cuda" and precision.name != "fp32":
        name = torch.cuda.get_device_name(precision.device)
        for known, value in _PEAKS.items():
            if known in name:
                return value
    key = (str(precision.device), precision.name, torch.get_num_threads())
    best, when = _peaks_seen.get(key, (0.0, -math.inf))
    if time.monotonic() - when > _PEAK_SECONDS:
        best = max(best, _measured_flops(precision))
        _peaks_seen[key] = best, time.monotonic()
    return best


def _measured_flops(precision: Precision) -> float:
    """Return the FLOP/s of a square matrix product, best of five.

    Processors without instructions for a type may need a second for a product of 1,024 rows, so a smaller one is taken
    where it is long enough to be measured.
    """
    # A separate generator, because a measurement must not advance the global random state.
    draw, best = torch.Generator().manual_seed(0), math.inf
    for size in (256, 512, 1024) if precision.device.type == "cpu" else (4096,):
        a = torch.randn(size, size, generator=draw).to(precision.device, precision.dtype)
        best = min(_product_seconds(a) for _ in range(5))
        if best > _LONG_ENOUGH:
            break
    return 2.0 * size**3 / best


def _product_seconds(a: torch.Tensor) -> float:
    start = time.perf_counter()
    (a @ a)[0, 0].item()
    return time.perf_counter() - start
