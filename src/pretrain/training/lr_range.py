"""Learning-rate range test (Smith 2015, arXiv 1506.01186): a short run of throwaway weights under a rising rate.

The rate grows exponentially from step to step until the loss rises again. The run takes place in a directory of its
own, which is removed; random state and the directory of the real run are left as they are.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.config import OptimConfig, RunConfig
from pretrain.config.check import check_count
from pretrain.config.spelling import TRAIN, option, option_name, using
from pretrain.data.row_source import RowSource
from pretrain.distributed.launched import launched
from pretrain.errors import ConfigError, TrainingError
from pretrain.training.early import check_early
from pretrain.training.optim import resolve_lr
from pretrain.training.run import about, make_objective, rows_of
from pretrain.training.state import isolated_torch_state
from pretrain.training.trainer import Trainer
from pretrain.utils.curves import Plot, Series, curve_svg
from pretrain.utils.directories import temporary_name
from pretrain.utils.files import note

__all__ = ["LrRange", "lr_range_test"]

# The part of the steps over which losses are averaged, where falls and rises are judged.
_WINDOW = 0.1
# The test ends when the running mean has lost this part of what it had gained.
_LOST = 0.5
_FEWEST = 10
# The suggestion is at most this part of the rate at which the loss is lowest, beyond which it rises.
_SAFE = 1 / 3


@dataclass(frozen=True)
class LrRange:
    """Result of a learning-rate range test.

    Attributes:
        rates: learning rate of each step.
        losses: training loss of each step, in nats per target.
        smoothed: mean of the losses around each step.
        lr: suggested peak learning rate; None if the loss never fell.
        reason: why this one, in a sentence.
        muon_lr: rate of Muon's matrices that belongs to ``lr``; None without Muon.
    """

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    lr: float | None
    reason: str
    muon_lr: float | None = None

    @property
    def suggested(self) -> dict[str, float]:
        """Settings of ``train`` and their suggested values; empty if the loss never fell."""
        rates = {"optim.lr": self.lr, "optim.muon_lr": self.muon_lr}
        return {key: rate for key, rate in rates.items() if rate is not None}

    def plot(self) -> Plot:
        """Draw the loss over the learning rate, which is logarithmic."""
        first = self.smoothed[0]
        shown = [
            loss if loss < 2 * first else math.nan for loss in self.losses
        ]  # the losses of a divergence would hide the rest
        lines = [
            Series("smoothed", list(zip(self.rates, self.smoothed, strict=True))),
            Series("loss", list(zip(self.rates, shown, strict=True))),
        ]
        title = "loss under a rising learning rate" + ("" if self.lr is None else f": {self.lr:g}")
        return Plot(curve_svg(lines, title=title, x_label="learning rate", log_x=True))

    def __repr__(self) -> str:
        beside = "" if self.muon_lr is None else f", muon_lr={self.muon_lr}"
        return f"LrRange(lr={self.lr}{beside}, {len(self.rates)} steps): {self.reason}"

    def _repr_svg_(self) -> str:
        return self.plot().svg


class _Rising(Trainer):
    """A trainer whose learning rate grows by the same factor at every step, and which stops when the loss diverges.

    Its ``optim.lr`` is 1.
    """

    def __init__(self, *args: Any, lowest: float, highest: float, **options: Any) -> None:
        super().__init__(*args, quiet=True, **options)
        self.lowest, self.highest = lowest, highest
        self.rates: list[float] = []
        self.losses: list[float] = []

    def lr_factor(self) -> float:
        share = self.state.step / max(1, self.state.total_steps - 1)
        return float(self.lowest * (self.highest / self.lowest) ** share)

    def _after_step(self, record: dict[str, Any]) -> None:
        super()._after_step(record)
        self.rates.append(record["lr"])
        self.losses.append(record["loss"])
        step, total = self.state.step, self.state.total_steps
        if step == 1 or step % max(1, total // 10) == 0:
            note(f"step {step:,} of {total:,}: lr {record['lr']:.2g}, loss {record['loss']:.4g}")

    def _out_of_patience(self) -> bool:
        return diverged(running_mean(self.losses, self.state.total_steps))


@using(TRAIN)
@isolated_torch_state()
def lr_range_test(
    config: str | os.PathLike[str] | Mapping[str, Any] | RunConfig | None = None,
    *,
    lowest: float = 1e-6,
    highest: float = 1.0,
    steps: int = 100,
    rows: RowSource | None = None,
    **sections: Any,
) -> LrRange:
    """Train throwaway weights under a learning rate that rises at every step, and suggest the rate of a run.

    Args:
        config: as in `pretrain.train`; its learning rate, limit, schedule and evaluations are not used. With Muon the
            rate of its matrices rises in proportion (``optim.muon_lr / optim.lr``), and both are suggested.
        lowest: learning rate of the first step.
        highest: learning rate of the last step, which a diverging loss prevents.
        steps: number of steps.
        rows: as in `pretrain.train`.
        **sections: as in `pretrain.train`.

    Returns:
        Rates, losses and the suggestion; a notebook shows the curve.

    Raises:
        PretrainError: a setting or the data cannot be used, such as an ``optim.lr`` of 0 beside Muon.
    """
    settings = RunConfig.load(config, sections or None)
    check_count("steps", steps, None)
    if not 0 < lowest < highest < math.inf or steps < _FEWEST:
        raise ConfigError(
            f"A range test needs 0 < lowest < highest and at least {_FEWEST} steps, and was given "
            f"{option('lowest', lowest)}, {option('highest', highest)}, {option('steps', steps)}."
        )
    if launched():
        raise ConfigError("A range test runs in one process: start it without a launcher.")
    settings.train = dataclasses.replace(settings.train, loggers=[])
    check_early(settings, rows)
    data = rows or rows_of(settings, quiet=False)
    folder = temporary_name(Path(f"{settings.train.out}.lr-range"), "new")
    goal = make_objective(settings, data)
    muon = _muon_beside(resolve_lr(settings.optim, goal)[0])
    trainer = _Rising(
        goal,
        data.train,
        optim=dataclasses.replace(
            settings.optim, lr=1.0, muon_lr=muon or 0.0, ema=0.0, unfreeze=0.0
        ),
        train=dataclasses.replace(
            settings.train,
            out=os.fspath(folder),
            limit=f"{steps} steps",
            save_every="0 steps",
        ),
        parallel=settings.parallel,
        about=about(settings, data),
        lowest=lowest,
        highest=highest,
    )
    try:
        trainer.fit()
    except TrainingError:
        if (
            not trainer.losses
        ):  # otherwise the loss or the gradient is no longer finite, which ends the test
            raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    suggested = judged(trainer.rates, trainer.losses, steps)
    if muon is None or suggested.lr is None:
        return suggested
    return dataclasses.replace(suggested, muon_lr=float(f"{muon * suggested.lr:.1e}"))


def _muon_beside(optim: OptimConfig) -> float | None:
    """Return the rate of Muon as a multiple of that of AdamW beside it; None without Muon.

    Raises:
        ConfigError: the rate of AdamW is 0.
    """
    if optim.name != "muon":
        return None
    if not optim.lr:
        raise ConfigError(
            f"With Muon a range test raises {option_name('muon_lr')} in proportion to {option_name('lr')}, which is 0. "
            "Give that a rate above 0, or leave it out."
        )
    return optim.muon_lr / float(optim.lr)


def running_mean(losses: list[float], steps: int) -> list[float]:
    """Return the mean of the latest losses at each step of a test of ``steps``, without the pull of its start."""
    means, mean, weight = [], 0.0, 0.0
    latest = min(1.0, 1 / (_WINDOW * steps))
    for loss in losses:
        mean += latest * (loss - mean)
        weight += latest * (1 - weight)
        means.append(mean / weight)
    return means


def diverged(means: list[float]) -> bool:
    """Whether the running mean has risen so far above its lowest value that higher rates need not be tried."""
    if not means or not math.isfinite(means[-1]):
        return bool(means)
    fall = max(means[0] - min(means), 0.02 * means[0])
    return len(means) >= _FEWEST and means[-1] > min(means) + _LOST * fall


def smooth(losses: list[float], steps: int) -> list[float]:
    """Return the mean of the losses around each step, which unlike a running mean does not lag behind them."""
    for _ in range(2):  # a mean of means gives the farthest losses the least weight
        half = max(1, round(_WINDOW * steps / 4))
        reach = [min(half, k, len(losses) - 1 - k) for k in range(len(losses))]
        losses = [statistics.fmean(losses[k - r : k + r + 1]) for k, r in enumerate(reach)]
    return losses


def judged(rates: list[float], losses: list[float], steps: int) -> LrRange:
    """Return the result of a test: the rate of the steepest fall, at a distance from the rate where the loss rises."""
    whole = next((k for k, loss in enumerate(losses) if not math.isfinite(loss)), len(losses))
    lows = smooth(losses[:whole], steps)
    smoothed = lows + losses[whole:]
    bottom = min(range(len(lows)), key=lows.__getitem__, default=0)
    if bottom < 2 or lows[bottom] > 0.99 * lows[0]:
        reason = f"the loss fell at none of the rates from {rates[0]:.2g} to {rates[-1]:.2g}"
        return LrRange(rates, losses, smoothed, None, reason)
    slopes = [lows[k - 1] - lows[k] for k in range(1, bottom + 1)]
    steepest = rates[1 + max(range(len(slopes)), key=slopes.__getitem__)]
    limit = _SAFE * rates[bottom]
    lr = float(f"{min(steepest, limit):.1e}")
    why = f"the loss falls fastest at {steepest:.2g} and is lowest at {rates[bottom]:.2g}"
    if steepest > limit:
        why += ", of which a third leaves room"
    end = "" if len(rates) == bottom + 1 else f"; it rises beyond, up to {rates[-1]:.2g}"
    return LrRange(rates, losses, smoothed, lr, f"{why}{end}")
