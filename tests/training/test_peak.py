"""Peak FLOP/s of this machine."""

from __future__ import annotations

import torch

from pretrain.training.peak import peak_flops
from pretrain.training.precision import choose_precision

CPU = torch.device("cpu")


def test_measured_peak_is_plausible_and_leaves_the_random_stream_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    peak = peak_flops(choose_precision("fp32", CPU))
    assert 1e8 < peak < 1e15
    assert torch.equal(before, torch.get_rng_state())
