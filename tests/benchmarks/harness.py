"""What all rows share: contenders that take turns, the check that they do equal work, the A/A control, the probe.

A case of a row has contenders of these kinds: one that is ``ours``; peers as their documents show (``default``) and
with the best honest settings (``best``); a ``floor``, which does less than the work or only its unavoidable part; and
``variant``, another setting of ours. Samples are costs of one unit of work, so that peer / ours above 1 speaks for us.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import math
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

KINDS = ("ours", "variant", "best", "default", "floor")
CONTROL = (0.97, 1.03)
BETAS, EPS, DECAY, CLIP = (0.9, 0.95), 1e-8, 0.1, 1.0
PACKAGES = (
    *("torch", "numpy", "transformers", "tokenizers", "datasets", "accelerate", "peft"),
    *("lightning", "litgpt", "x-transformers", "sentence-transformers", "timm"),
)


@dataclass(frozen=True)
class Work:
    """What a contender did with copied weights.

    Attributes:
        tokens: tokens of one unit of work, without padding.
        losses: per target, with the copied weights first, after the checked steps last.
        update: norm of the change of all weights over these steps; None if that is not defined.
        others: whatever else has to be the same to the last bit, such as a hash of ids.
    """

    tokens: int
    losses: Sequence[float] = ()
    update: float | None = None
    others: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Tolerance:
    """Relative differences that rounding explains: of the first loss, of the last one, of the update norm."""

    first: float
    last: float
    update: float


FP32 = Tolerance(1e-4, 1e-3, 0.01)
BF16 = Tolerance(2e-3, 1e-2, 0.03)


def unequal(ours: Work, peer: Work, within: Tolerance) -> str:
    """Say in what the work of a peer differs from ours; empty if in nothing."""
    found = []
    if ours.tokens != peer.tokens:
        found.append(f"{peer.tokens:,} tokens where ours has {ours.tokens:,}")
    for name in ours.others.keys() & peer.others.keys():
        if ours.others[name] != peer.others[name]:
            found.append(f"{name} is {peer.others[name]} where ours has {ours.others[name]}")
    figures = []
    if ours.losses and peer.losses:
        figures.append(("the first loss", ours.losses[0], peer.losses[0], within.first))
    if len(ours.losses) > 1 and len(peer.losses) > 1:
        figures.append(("the last loss", ours.losses[-1], peer.losses[-1], within.last))
    if ours.update is not None and peer.update is not None:
        figures.append(("the update norm", ours.update, peer.update, within.update))
    for name, mine, theirs, most in figures:
        # Written so that a NaN is unequal.
        if not abs(mine - theirs) <= most * abs(mine):
            found.append(f"{name} is {theirs:.6g} where ours has {mine:.6g}")
    return "; ".join(found)


@dataclass
class Contender:
    """One way to do the work.

    Attributes:
        name, kind: of the tables.
        make: prepares everything that is not measured and returns a function that does the work once and returns
            its cost, and what was done, as checked with copied weights.
        needs: the package without which it is left out.
        loose: it visits the same rows in another order, or trains other parameters: only tokens and first loss count.
    """

    name: str
    kind: str
    make: Callable[[], tuple[Callable[[], float], Work]]
    needs: str = "torch"
    loose: bool = False


@dataclass(frozen=True)
class Settings:
    """Of a run of the program.

    Attributes:
        device: cpu or cuda.
        tiny: shapes that only show that a row works.
        long: also the shapes that take long.
        rounds: fewest and most rounds of a case.
    """

    device: torch.device
    tiny: bool = False
    long: bool = False
    rounds: tuple[int, int] = (3, 12)

    def clock(self) -> float:
        """CPU seconds of this process (one thread), or seconds after a synchronisation on a GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    @property
    def compiler(self) -> dict[str, str]:
        """Options of torch.compile: a tiny run traces, and generates no code."""
        return {"backend": "eager"} if self.tiny else {}

    @property
    def unit(self) -> str:
        """What ``clock`` counts."""
        return "seconds" if self.device.type == "cuda" else "CPU seconds"


@dataclass
class Case:
    """A table of a row: its contenders and how they are compared.

    Attributes:
        name: says shape and number type.
        unit: of the samples.
        contenders: exactly one is ours.
        bars: least median of peer / ours for a kind or a name, as the project has set it.
        within: tolerances of the equal-work check.
        controlled: whether an A/A control is required; costs that do not vary, such as memory, need none.
        rounds: fewest and most, where they differ from those of the run.
        extra: further entries of the record, asked for after the measurement.
    """

    name: str
    unit: str
    contenders: Sequence[Contender]
    bars: Mapping[str, float] = field(default_factory=dict)
    within: Tolerance = FP32
    controlled: bool = True
    rounds: tuple[int, int] | None = None
    extra: Callable[[], Mapping[str, Any]] = dict


def compare(case: Case, settings: Settings, deadline: float) -> dict[str, Any]:
    """Measure a case: check the work, then let the contenders take turns until ``deadline`` (time.monotonic).

    Ours is measured first and last in every round, and every other round runs backwards; the ratio of the two is the
    A/A control. If its median lies outside 0.97 to 1.03 everything is measured once more, then the case is discarded.
    """
    record: dict[str, Any] = {
        "case": case.name,
        "unit": case.unit,
        "bars": dict(case.bars),
        "why": "",
    }
    entries: list[dict[str, Any]] = []
    runs: dict[str, Callable[[], float]] = {}
    ours: Work | None = None
    for one in sorted(case.contenders, key=lambda c: KINDS.index(c.kind)):
        entry: dict[str, Any] = {
            "name": one.name, "kind": one.kind, "state": "ok", "why": "", "samples": [], "work": None,
        }  # fmt: skip
        entries.append(entry)
        if not installed(one.needs):
            entry |= {"state": "missing", "why": f"{one.needs} is not installed"}
            continue
        try:
            run, work = one.make()
        except Exception as error:  # a peer that cannot run is a result
            if one.kind == "ours":
                raise
            traceback.print_exc()
            entry |= {"state": "failed", "why": f"{type(error).__name__}: {error}"[:500]}
            continue
        entry["work"] = {
            "tokens": work.tokens, "losses": list(work.losses), "update": work.update, **work.others,
        }  # fmt: skip
        if one.kind == "ours":
            ours = work
        assert ours is not None, f"{case.name}: no contender is ours"
        kept = Work(work.tokens, work.losses[:1], None, work.others) if one.loose else work
        entry["why"] = unequal(ours, kept, case.within)
        if entry["why"]:
            entry["state"] = "failed"
        else:
            runs[one.name] = run
    record["contenders"] = entries
    least, most = (1, 1) if settings.tiny else case.rounds or settings.rounds
    for attempt in range(2):
        samples, control = take_turns(runs, case.controlled, least, most, deadline)
        record["attempts"], record["control"] = attempt + 1, control
        ratio = statistics.median(control) if control else 1.0
        record["state"] = (
            "ok" if CONTROL[0] <= ratio <= CONTROL[1] or settings.tiny else "discarded"
        )
        if record["state"] == "ok":
            break
        record["why"] = f"the A/A control is {ratio:.3f}"
    for entry in entries:
        entry["samples"] = samples.get(entry["name"], [])
    if record["state"] == "ok":
        record["why"] = ""
        peers = [entry for entry in entries if entry["kind"] in ("best", "default", "floor")]
        states = {entry["state"] for entry in peers}
        if "failed" in states and "ok" not in states:
            record |= {"state": "failed", "why": "no peer did equal work"}
    return record | case.extra()


def installed(name: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(name) is not None


def take_turns(
    runs: Mapping[str, Callable[[], float]],
    controlled: bool,
    least: int,
    most: int,
    deadline: float,
) -> tuple[dict[str, list[float]], list[float]]:
    """Samples of each contender, and second / first of the two measurements of ours in each round."""
    names = list(runs)
    samples: dict[str, list[float]] = {name: [] for name in names}
    control: list[float] = []
    for number in range(most):
        if number >= least and time.monotonic() > deadline:
            break
        order = [*names, names[0]] if controlled else names
        taken = [measured(runs[name]) for name in (order if number % 2 == 0 else reversed(order))]
        if number % 2:
            taken.reverse()  # now in the order of the names
        if controlled:
            again = taken.pop()
            control.append(again / taken[0])
            taken[0] = (taken[0] + again) / 2
        for name, cost in zip(names, taken, strict=True):
            samples[name].append(cost)
    return samples, control


def measured(run: Callable[[], float]) -> float:
    """Cost of one call, without the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        return run()
    finally:
        gc.enable()


def timed(work: Callable[[], Any], settings: Settings, seconds: float = 0.3) -> Callable[[], float]:
    """Return a function that repeats ``work``, which is warm, for about ``seconds``, and returns the cost of once."""
    start = settings.clock()
    work()
    taken = max(settings.clock() - start, 1e-6)
    repeat = 1 if settings.tiny else max(1, round(seconds / taken))

    def run() -> float:
        began = settings.clock()
        for _ in range(repeat):
            work()
        return (settings.clock() - began) / repeat

    return run


def adamw(module: nn.Module, lr: float = 1e-3) -> torch.optim.AdamW:
    """Fused AdamW with our groups: matrices that are no embeddings decay."""
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    params = [p for p in module.parameters() if p.requires_grad]
    decays = [p.ndim >= 2 and id(p) not in tables for p in params]
    groups = [
        {
            "params": [p for p, d in zip(params, decays, strict=True) if d is which],
            "weight_decay": w,
        }
        for which, w in ((True, DECAY), (False, 0.0))
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=BETAS, eps=EPS, fused=True)


class Stepper:
    """Training steps over batches in turn: autocast, backward, clip, AdamW.

    Args:
        module: has the parameters.
        loss: micro-batch -> its part of the mean loss over the targets of its step.
        batches: the micro-batches of each step.
        dtype: of the arithmetic; weights are fp32.
        device: of module and batches.
        optimizer: has ``step`` and ``zero_grad``; `adamw` if None.
        targets: of each step, if they differ.
    """

    def __init__(
        self,
        module: nn.Module,
        loss: Callable[[Any], Tensor],
        batches: Sequence[Sequence[Any]],
        dtype: torch.dtype,
        device: torch.device,
        optimizer: Any = None,
        targets: Sequence[float] | None = None,
    ) -> None:
        self.targets = targets
        self.module, self.loss, self.batches = module, loss, batches
        on = dtype is not torch.float32
        self.cast = functools.partial(torch.autocast, device.type, dtype=dtype, enabled=on)
        self.params = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = adamw(module) if optimizer is None else optimizer

    def step(self, batch: Sequence[Any]) -> float | Tensor:
        total: float | Tensor = 0.0
        for part in batch:
            with self.cast():
                loss = self.loss(part)
            loss.backward()
            total = total + loss.detach()
        torch.nn.utils.clip_grad_norm_(self.params, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def all(self) -> None:
        """One step on each batch."""
        for batch in self.batches:
            self.step(batch)

    def score(self) -> float:
        """Mean loss over all targets, without a step."""
        with torch.no_grad(), self.cast():
            found = [sum(float(self.loss(part)) for part in step) for step in self.batches]
        weights = self.targets or [1.0] * len(found)
        return sum(a * b for a, b in zip(found, weights, strict=True)) / sum(weights)

    def check(self, tokens: int, least: int = 3) -> Work:
        """Record losses before and after at least so many steps, and their update."""
        before = [p.detach().clone() for p in self.params]
        losses = [self.score()]
        for batch in list(self.batches) * math.ceil(least / len(self.batches)):
            self.step(batch)
        losses.append(self.score())
        return Work(tokens, losses, moved(self.params, before))


def moved(params: Sequence[Tensor], before: Sequence[Tensor]) -> float:
    """Norm of the change of all parameters."""
    with torch.no_grad():
        pairs = zip(params, before, strict=True)
        return math.sqrt(sum(float((p - q).double().square().sum()) for p, q in pairs))


def probe() -> dict[str, float]:
    """GFLOP/s of a product of matrices and GB/s of a copy on one CPU thread, best of three: is the machine the same?"""
    a, b = torch.randn(768, 768), torch.randn(8_000_000)
    c = torch.empty_like(b)
    flops, copies = [], []
    for _ in range(3):
        start = time.process_time()
        a @ a
        flops.append(2 * 768**3 / (time.process_time() - start) / 1e9)
        start = time.process_time()
        c.copy_(b)
        copies.append(2 * b.nbytes / (time.process_time() - start) / 1e9)
    return {"gflops": max(flops), "copy_gb": max(copies), "load": os.getloadavg()[0]}


def device_probe(device: torch.device) -> dict[str, float]:
    """As `probe`, and on a GPU its bf16 product of random matrices and its copy."""
    found = probe()
    if device.type == "cuda":
        a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
        for key, work, amount in (
            ("gpu_tflops", lambda: a @ b, 2 * 8192**3 / 1e12),
            ("gpu_copy_gb", lambda: a.copy_(b), 2 * a.nbytes / 1e9),
        ):
            for _ in range(3):
                work()
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(10):
                work()
            torch.cuda.synchronize()
            found[key] = 10 * amount / (time.perf_counter() - start)
    return found


def about(device: torch.device) -> dict[str, Any]:
    """Versions and machine."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            ]
        model = names[0] if names else model
    return {
        "versions": versions,
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "started": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def child(arguments: Iterable[str], **environment: str) -> tuple[str, float, float]:
    """Run ``python -m`` this package ``child`` with arguments in a process of its own.

    Returns:
        What it printed, the wall seconds and the CPU seconds that it and its own children took.
    """
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    paths = [root, os.path.join(root, "src"), os.environ.get("PYTHONPATH", "")]
    before, start = os.times(), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks", "child", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
        cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    seconds, after = time.perf_counter() - start, os.times()
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed: {done.stderr[-1500:]}")
    spent = (after.children_user - before.children_user) + (
        after.children_system - before.children_system
    )
    return done.stdout, seconds, spent
