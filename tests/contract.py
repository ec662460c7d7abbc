"""What every model must do, whatever its family; call ``check_model`` with a function that builds one.

Shapes, initial statistics, a gradient for every parameter, one batch learned by heart, equal after saving and
loading, the same weights from the same seed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.models.base import Model

Build = Callable[..., Model]


def batch_for(model: Model, rows: int = 4, tokens: int = 12) -> dict[str, Tensor]:
    """Random rows, the last one padded on the right."""
    generator = torch.Generator().manual_seed(0)
    pad = model.backbone.config.pad_id or 0
    ids = torch.randint(4, model.backbone.vocab_size, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, tokens // 2 :] = 0
    return {"input_ids": torch.where(mask == 1, ids, pad), "attention_mask": mask}


def loss_of(model: Model, batch: dict[str, Tensor]) -> Tensor:
    """Cross entropy against fixed random answers, on real tokens."""
    logits = model(batch)
    real = batch["attention_mask"].bool()
    if logits.shape[:2] == real.shape:
        logits = logits[real]
    targets = torch.arange(logits.shape[0]) * 7 % logits.shape[-1]
    return F.cross_entropy(logits, targets)


def check_model(build: Build, outputs: int | None = None) -> None:
    """Run every check on models that ``build(seed=...)`` makes.

    Args:
        build: returns a fresh model on the CPU.
        outputs: size of the last dimension of the output; not checked when None.
    """
    check_shapes(build(seed=0), outputs)
    check_seed(build)
    check_init(build(seed=0))
    check_gradients(build(seed=0))
    check_save_and_load(build)
    check_checkpointing(build(seed=0))
    check_overfit(build(seed=0))


def check_shapes(model: Model, outputs: int | None) -> None:
    model.eval()
    batch = batch_for(model)
    out = model(batch)
    assert out.dtype == torch.float32 and torch.isfinite(out).all()
    if outputs is not None:
        assert out.shape[-1] == outputs
    rows, tokens = batch["input_ids"].shape
    whole_row = model.head_kind == "sequence-classification"
    assert out.shape[:-1] == ((rows,) if whole_row else (rows, tokens))
    for parameter in model.parameters():
        assert parameter.dtype == torch.float32 and not parameter.is_meta


def check_seed(build: Build) -> None:
    torch.manual_seed(1)
    first = dict(build(seed=3).named_parameters())
    state = torch.get_rng_state()
    torch.manual_seed(2)
    second = dict(build(seed=3).named_parameters())
    torch.set_rng_state(state)
    assert all(torch.equal(first[n], second[n]) for n in first)
    third = dict(build(seed=4).named_parameters())
    assert any(not torch.equal(first[n], third[n]) for n in first)


def check_init(model: Model) -> None:
    std = model.backbone.config.initializer_range
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        assert torch.isfinite(value).all(), name
        if value.ndim < 2:
            assert bool((value == (1.0 if name.endswith("weight") else 0.0)).all()), name
        elif value.numel() > 1000 and not name.startswith("head."):
            assert abs(float(value.mean())) < 5 * std / value.numel() ** 0.5 + 1e-4, name
            assert float(value.std()) < 1.1 * std, name


def check_gradients(model: Model) -> None:
    """Every parameter is reached, positions and segments that no row has aside."""
    batch = batch_for(model)
    loss_of(model, batch).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} gets no gradient"
        assert torch.isfinite(parameter.grad).all(), name
        zero_by_symmetry = name.endswith("attention.key.bias") and not hasattr(
            model.backbone, "rotary"
        )
        if not zero_by_symmetry:
            assert parameter.grad.abs().max() > 0, f"the gradient of {name} is zero"


def check_save_and_load(build: Build) -> None:
    model, other = build(seed=0).eval(), build(seed=1).eval()
    report = other.load_disk_state(model.disk_state())
    assert not report.missing and not report.unexpected
    batch = batch_for(model)
    assert torch.equal(model(batch), other(batch))
    if type(model.backbone).__module__.startswith("pretrain."):
        fresh = Model.from_hf_config(model.hf_config())
        assert all(p.is_meta for p in fresh.parameters())
        fresh.load_disk_state(model.disk_state())
        assert torch.equal(model(batch), fresh.eval()(batch))
        assert fresh.hf_config() == model.hf_config()


def check_checkpointing(model: Model) -> None:
    """Recomputing activations changes no gradient."""
    batch = batch_for(model)
    grads = []
    for on in (False, True):
        model.zero_grad()
        torch.manual_seed(0)  # a head may have dropout
        model.backbone.activation_checkpointing = on
        loss_of(model.train(), batch).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def check_overfit(model: Model, steps: int = 60) -> None:
    batch = batch_for(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = None
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        first = float(loss.detach()) if first is None else first
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.2 * first, (
        f"one batch is not learned: {first:.3f} -> {float(loss):.3f}"
    )
