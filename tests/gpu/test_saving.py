"""Saving a model that lies on a CUDA device: the copy goes through pinned memory. Run with -m gpu."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pretrain.checkpoint import Saver, TrainingState, save_checkpoint
from pretrain.checkpoint.saving import Staging
from pretrain.models import build

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()
    }


def test_the_copies_are_pinned_and_right() -> None:
    staging = Staging()
    tensors = [torch.randn(300, 7, device="cuda"), torch.tensor(3.0, device="cuda"), torch.ones(5)]
    for _ in range(2):
        for copy, tensor in zip(staging.allocate(tensors, pin=True), tensors, strict=True):
            copy.copy_(tensor, non_blocking=True)
            torch.cuda.synchronize()
            assert copy.device.type == "cpu" and torch.equal(copy, tensor.cpu())
    assert staging._pinned is not None, "CUDA refused to pin the memory"
    staging.free()
    assert staging._pinned is None


def test_later_changes_on_the_device_never_reach_the_files(tmp_path: Path) -> None:
    model = build("gpt2", vocab_size=500, hidden_size=64).cuda()
    moments = {f"exp_avg/{name}": torch.randn_like(p) for name, p in model.named_parameters()}
    about = {"step": 1, "tokens": 0, "pretrain_block": {}}
    training = TrainingState({"optimizer": moments}, {})
    plain = save_checkpoint(tmp_path / "plain", model, training=training, **about)
    with Saver(tmp_path / "run", background=True) as saver:
        path = saver.save(model, training=training, **about)
        with torch.no_grad():
            for tensor in (*model.parameters(), *moments.values()):
                tensor.add_(1)
    assert contents(path) == contents(plain)
