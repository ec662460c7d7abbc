"""Choice of the device and the compute precision.

Weights, moments and reductions are always fp32; only the arithmetic of the forward and backward pass changes.
fp16 needs loss scaling (arXiv 1710.03740); bf16 does not. fp8 is bf16 with the products of the blocks in float8, in
training only (``pretrain.training.float8``).
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pretrain.config.spelling import option, option_name
from pretrain.distributed.launched import launched
from pretrain.errors import ConfigError, did_you_mean
from pretrain.nn.device import multiplies_bf16_fast

if TYPE_CHECKING:
    from pretrain.config import TrainConfig
    from pretrain.distributed.world import World

__all__ = [
    "LossScale",
    "Precision",
    "choose_device",
    "choose_precision",
    "common_precision",
    "evaluation_precision",
    "evaluation_setting",
    "recorded_precision",
]

PRECISIONS = ("auto", "bf16", "fp16", "fp32")
_FLOAT8_SINCE = (8, 9)  # compute capability of the first GPUs with float8 products (Ada, Hopper)


@dataclass(frozen=True)
class Precision:
    """The chosen compute type on a device, with the reason that is printed."""

    name: str
    dtype: torch.dtype
    device: torch.device
    reason: str

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Context of a forward pass; a no-op for fp32."""
        if self.dtype is torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


def choose_device(name: str = "auto") -> torch.device:
    """Return the named device, or the best available one for ``auto``.

    Raises:
        ConfigError: the device is unknown or not available, or it is mps and this process is one of several.
    """
    kinds = ("auto", "cpu", "cuda", "mps")
    if name.split(":")[0] not in kinds:
        raise ConfigError(f"{option_name('device')} is {name!r}." + did_you_mean(name, kinds))
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    device = torch.device(
        next(kind for kind in available if available[kind]) if name == "auto" else name
    )
    if not available[device.type]:
        foreign = (device.type == "mps") != (sys.platform == "darwin")  # no build has it here
        raise ConfigError(
            f"{option_name('device')} is {name!r}, but this machine or this build of torch has no {device.type} "
            f"device. Use {option('device', 'auto')}"
            + ("." if foreign else ", or install a torch build for your hardware.")
        )
    if device.type == "mps" and launched():
        raise ConfigError(
            "This process is one of several, and torch cannot communicate between processes on Apple's GPU (mps). "
            f"Start one process only, or set {option('device', 'cpu')}."
        )
    return device


def choose_precision(name: str, device: torch.device, *, training: bool = False) -> Precision:
    """Return the named precision; ``auto`` chooses by the hardware. fp8 is one of ``training`` only.

    Raises:
        ConfigError: unknown name, fp16 on a CPU, or fp8 without training or on a device that has none.
    """
    if name == "fp8":
        return _float8(device, training)
    if name not in PRECISIONS:
        raise ConfigError(
            f"train.precision is {name!r}." + did_you_mean(name, (*PRECISIONS, "fp8"))
        )
    if name == "fp16" and device.type == "cpu":
        raise ConfigError(
            "train.precision is fp16 on a CPU, where fp16 products run hundreds of times slower than fp32. "
            "Use train.precision=auto, which takes bf16 where the processor has it."
        )
    types = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if name != "auto":
        return Precision(name, types[name], device, "as configured")
    fast = multiplies_bf16_fast(device)
    if device.type == "cuda":
        chosen, why = ("bf16", "tensor cores") if fast else ("fp16", "this GPU has no fast bf16")
    elif device.type == "cpu":
        chosen = "bf16" if fast else "fp32"
        why = "the CPU has bf16 dot products" if fast else "no bf16 on this CPU"
    else:
        chosen, why = "fp32", f"{device.type} runs it without loss scaling"
    return Precision(chosen, types[chosen], device, why)


def _float8(device: torch.device, training: bool) -> Precision:
    """Return fp8 for training on this device.

    Raises:
        ConfigError: it is not for training, or the device multiplies no float8.
    """
    if not training:
        raise ConfigError(
            "fp8 is a precision of training (train.precision) only: a model that was trained in it is evaluated in "
            "fp32 or bf16. Set precision to one of these, or leave it out."
        )
    missing = device.type == "mps"
    if device.type == "cuda":
        missing = torch.cuda.get_device_capability(device) < _FLOAT8_SINCE
    if missing:
        raise ConfigError(
            f"train.precision is fp8, but this {device.type} device has no float8 products: NVIDIA GPUs have them "
            "since compute capability 8.9 (Ada, Hopper). Use train.precision=auto."
        )
    why = (
        "as configured" if device.type == "cuda" else "for trying its quality: on a CPU it is slow"
    )
    return Precision("fp8", torch.bfloat16, device, why)


def evaluation_setting(train: TrainConfig) -> str:
    """Return the precision of evaluations by the settings of a run: that of training, or bf16 for fp8, or fp32."""
    if train.eval_precision == "fp32":
        return "fp32"
    return "bf16" if train.precision == "fp8" else train.precision


def recorded_precision(recorded: object, device: torch.device) -> Precision:
    """Return a precision that a file states, on a device that may be another than that of the run.

    It is fp32 where the file states none, and instead of fp16 on a CPU, where fp16 is far slower.
    """
    usable = recorded in PRECISIONS and not (recorded == "fp16" and device.type == "cpu")
    return choose_precision(str(recorded) if usable else "fp32", device)


def evaluation_precision(
    setting: str, compute: Precision, *, gathered: torch.dtype = torch.float32
) -> Precision:
    """Return the precision of evaluations.

    In half precision the logits of a row depend on the other rows of its batch, so the figures of a checkpoint would
    depend on the batch size; in fp32 only the last bits differ.

    Args:
        setting: ``train.eval_precision``.
        compute: compute precision of training.
        gathered: type in which FSDP2 gathers the weights; blocks in half precision cannot compute in fp32.
    """
    if compute.name == "fp8":
        compute = replace(compute, name="bf16", reason="float8 is for training")
    if setting == "train" or compute.dtype is torch.float32:
        return compute
    if gathered is not torch.float32:
        return replace(compute, reason="FSDP2 gathers the blocks in it")
    return Precision("fp32", torch.float32, compute.device, "figures do not depend on the batch")


class LossScale:
    """Dynamic loss scaling for fp16; its state is two numbers, stored exactly in a checkpoint.

    The scale halves when a gradient overflows and doubles after ``interval`` good steps.
    """

    def __init__(self, enabled: bool, scale: float = 65536.0, interval: int = 2000) -> None:
        self.enabled, self.interval = enabled, interval
        self.scale = scale if enabled else 1.0
        self.good = 0

    def unscale(self, grads: list[Tensor]) -> None:
        """Divide the gradients by the scale, in place."""
        if self.enabled and grads:
            torch._foreach_mul_(grads, 1.0 / self.scale)

    def update(self, finite: bool) -> None:
        """Adapt the scale after a step."""
        if not self.enabled:
            return
        if not finite:
            self.scale, self.good = max(1.0, self.scale / 2), 0
            return
        self.good += 1
        if self.good >= self.interval:
            self.scale, self.good = self.scale * 2, 0

    def may_cause_overflow(self) -> bool:
        """Whether an overflow can be caused by the scale rather than by the model."""
        return self.enabled and self.scale > 1.0

    def state(self) -> dict[str, float]:
        """Return the state for a checkpoint; empty if disabled."""
        return {"scale": self.scale, "good": self.good} if self.enabled else {}

    def load(self, state: dict[str, float]) -> None:
        """Load what ``state`` returned; a run whose precision has changed keeps its initial scale."""
        if not (self.enabled and state):
            return
        self.scale, self.good = float(state["scale"]), int(state["good"])


def common_precision(setting: str, device: torch.device, world: World) -> Precision:
    """Choose the compute precision, the same on every rank.

    Raises:
        ConfigError: ``auto`` resolves to different types on different hosts.
    """
    precision = choose_precision(setting, device, training=True)
    names = world.all_gather_object(precision.name)
    if len(set(names)) > 1:
        types = ", ".join(f"{name} on rank {names.index(name)}" for name in sorted(set(names)))
        raise ConfigError(
            f"train.precision=auto means {types}: the hosts are not alike. Set train.precision to one that all support."
        )
    return precision
