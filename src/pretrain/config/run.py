"""The settings of a run: six sections, strict, torch-free.

A run is data, a model, an objective, an optimizer, a schedule of work and a device. Each section is
one dataclass; the same fields are the YAML keys, the options of ``pretrain train`` and the keyword
arguments of `pretrain.train`. Whatever is unknown, of the wrong type or impossible is refused here,
by name, before anything is allocated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from pretrain.errors import ConfigError

__all__ = [
    "DataConfig",
    "Limit",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "ParallelConfig",
    "RunConfig",
    "TrainConfig",
    "fields",
    "parse_every",
    "parse_limit",
]


def within(default: Any, low: float, high: float) -> Any:
    """A field whose value must lie between ``low`` and ``high``, both allowed."""
    return field(default=default, metadata={"low": low, "high": high})


@dataclass
class DataConfig:
    """What is learned from."""

    train: Any = "python"
    """A prepared directory, or sources: a path, glob, folder, "hub:NAME" or "python" (the built-in
    corpus), a list of them, or {source: weight}."""
    valid: float | str = 0.01
    """Held-out text: a fraction of the documents, a source, or "last:0.1" (the last tenth of a
    single text)."""
    text: str | dict[str, str] = "text"
    """Column that holds the text in .jsonl, .csv, .tsv and .parquet files; {file: column} where they differ."""
    separator: str | None = None
    """Text between the documents of one file; not given, one file or one row is one document."""
    encoding: str | None = None
    """Encoding of text files and tables; not given, UTF-8."""
    tokenizer: str = "bpe"
    """bpe, wordpiece or char (trained on the data), or the path of a tokenizer or a checkpoint."""
    vocab_size: int = within(8192, 8, 1 << 22)
    """Size of the vocabulary to train."""
    row_length: int = within(512, 2, 1 << 20)
    """Tokens in one row."""
    cache: str | None = None
    """Directory in which prepared data are kept."""
    workers: int | None = within(None, 1, 4096)
    """Processes that prepare the data; not given, all cores."""


@dataclass
class ModelConfig:
    """What learns."""

    family: str = "qwen3"
    """gpt2, llama, mistral, qwen2, qwen3, bert, roberta, modernbert, or "package.module:Class"."""
    size: str = "small"
    """Name of a size: tiny, mini, small, base, ..."""
    checkpoint: str | None = None
    """Directory of weights to start from; family and size are then taken from it."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Fields of the family's own config, e.g. {num_layers: 6}."""


@dataclass
class ObjectiveConfig:
    """What is learned."""

    class_path: str = "NextToken"
    """NextToken, MaskedLM, or the import path of an objective of your own."""
    init_args: dict[str, Any] = field(default_factory=dict)
    """Its arguments, e.g. {rate: 0.3}."""


@dataclass
class OptimConfig:
    """How the weights move."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon (Muon for the matrices, AdamW for the rest)."""
    lr: float = within(1e-3, 0.0, 100.0)
    """Peak learning rate of AdamW."""
    muon_lr: float = within(0.02, 0.0, 100.0)
    """Peak learning rate of Muon."""
    betas: tuple[float, float] = within((0.9, 0.95), 0.0, 1.0 - 1e-9)
    """Decay of the two moments of AdamW."""
    eps: float = within(1e-8, 1e-30, 1.0)
    """Added to the square root of the second moment."""
    weight_decay: float = within(0.1, 0.0, 100.0)
    """Decoupled weight decay of the matrices (never of norms, biases and embeddings)."""
    clip: float = within(1.0, 0.0, 1e6)
    """Largest norm of the gradient; 0 is off."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up; wsd is warm-up, stable, decay."""
    warmup: float = within(0.02, 0.0, 1e9)
    """Warm-up: a fraction of the steps (below 1) or a number of steps."""
    decay: float = within(0.4, 0.0, 1.0)
    """Fraction of the steps spent cooling down (wsd)."""
    min_lr: float = within(0.1, 0.0, 1.0)
    """Learning rate at the end, as a fraction of the peak."""
    ema: float = within(0.0, 0.0, 1.0 - 1e-9)
    """Decay of the moving average of the weights; 0 is off."""
    layer_decay: float = within(1.0, 1e-6, 1.0)
    """Learning rate of every layer as a fraction of that of the layer above it, embeddings last; 1 is the same."""
    unfreeze: float = within(0.0, 0.0, 1.0)
    """Fraction of the steps over which the layers are released one by one from the top: first the
    head alone learns, the embeddings come last; 0 is all from the start."""
    l2_sp: float = within(0.0, 0.0, 1e9)
    """Pull of the weights that were loaded towards where they started, in place of weight decay; 0 is off."""


@dataclass
class TrainConfig:
    """How long, how often, and where to."""

    out: str = "runs/run"
    """Directory of the run; the same command again resumes it."""
    limit: str = "1 epochs"
    """When to stop: "500 steps", "1e9 tokens", "3 epochs" or "10 minutes"."""
    batch_rows: int = within(32, 1, 1 << 24)
    """Rows in one optimizer step, all devices and micro-batches together."""
    micro_rows: int = within(0, 0, 1 << 24)
    """Rows in one forward pass of one process; 0 is chosen."""
    eval_every: str = "5%"
    """Evaluate every "200 steps", "0.5 epochs" or "5%" of the run; "0 steps" is never."""
    eval_rows: int = within(0, 0, 1 << 40)
    """Held-out rows in one evaluation; 0 is all of them."""
    save_every: str = "10%"
    """Save every "200 steps", "0.5 epochs" or "10%" of the run; "0 steps" is only at the end."""
    async_save: bool = False
    """Copy what is saved and write it while training goes on: a short stall for memory of one more copy."""
    keep: int = within(2, 1, 1 << 20)
    """Checkpoints that are kept, besides the best."""
    best: bool = True
    """Keep the checkpoint that is best on the held-out rows, by train.monitor."""
    monitor: str = "loss"
    """Held-out figure that decides which checkpoint is best, and patience: lower is better for loss,
    perplexity, bits_per_byte, mse, rmse and mae, higher for all others. Of equal figures the one with the
    lower loss is the better. The last evaluation is taken for the best one unless another figure is higher
    by more than chance, a standard error of a share of the targets; a loss is taken as it is."""
    patience: int = within(0, 0, 1 << 20)
    """Evaluations without improvement before stopping; 0 is off."""
    log_every: int = within(10, 1, 1 << 30)
    """Steps between two lines of the log."""
    sample: str = ""
    """Prompt shown at every evaluation; empty is chosen from the held-out rows."""
    loggers: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=list)
    """Loggers besides log.jsonl: tensorboard, wandb, trackio."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Compute precision; auto is bf16 where the device is good at it."""
    eval_precision: Literal["fp32", "train"] = "fp32"
    """Precision of evaluations: fp32, in which a figure does not depend on how rows are batched, or that
    of training, which is faster."""
    seed: int = within(0, 0, (1 << 63) - 1)
    """Seed of the weights, the order, the masks and the dropout."""


@dataclass
class ParallelConfig:
    """What it runs on."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto, cpu, cuda or mps."""
    compile: bool = False
    """Compile the blocks with torch.compile."""
    activation_checkpointing: Literal["off", "selective", "full"] = field(
        default="off", metadata={"flag": {True: "full", False: "off"}}
    )
    """Computed again in the backward pass to save memory: nothing, the cheap half of a block, or all of it."""
    threads: int = within(0, 0, 4096)
    """CPU threads; 0 is torch's choice, among several processes of a host an equal share of its cores."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """ddp (each process holds the model), fsdp (each holds a part), or auto: ddp where it fits into memory."""
    dp_replicate: int = within(0, 0, 1 << 20)
    """Copies of the model that see different rows; 0 is what is left."""
    dp_shard: int = within(0, 0, 1 << 20)
    """Processes that one copy is cut over, and that see different rows (fsdp); 0 is chosen."""
    tp: int = within(1, 1, 1 << 20)
    """Processes that each matrix is cut over, and that see the same rows (tensor parallelism)."""
    cpu_offload: bool = False
    """Keep the cut weights and moments in the memory of the host (fsdp on CUDA): slow, and it fits."""
    reproducible: bool = False
    """The same bits on any number of processes that is a power of two: slower sums, and ddp alone."""
    timeout: float = within(300.0, 1.0, 1e6)
    """Seconds without progress after which a process counts as hung and the run ends with an error."""

    def __post_init__(self) -> None:
        given: Any = self.activation_checkpointing
        if isinstance(given, bool):
            self.activation_checkpointing = "full" if given else "off"


@dataclass(frozen=True)
class Limit:
    """When a run ends: ``value`` of ``kind``; whole for steps and tokens."""

    kind: Literal["steps", "tokens", "epochs", "minutes"]
    value: float

    def __str__(self) -> str:
        return f"{self.value:g} {self.kind}"


_AMOUNT = re.compile(
    r"\s*([0-9][0-9_]*(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?|\.[0-9]+)\s*([A-Za-z]+|%)\s*"
)
_UNITS: dict[str, tuple[Literal["steps", "tokens", "epochs", "minutes"], float]] = {
    "step": ("steps", 1),
    "token": ("tokens", 1),
    "epoch": ("epochs", 1),
    "minute": ("minutes", 1),
    "min": ("minutes", 1),
    "hour": ("minutes", 60),
    "second": ("minutes", 1 / 60),
}


def _amount(text: object) -> tuple[float, str]:
    """Split "500 steps" into (500.0, "step"); (nan, "") when it is not an amount."""
    match = _AMOUNT.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        return math.nan, ""
    unit = match[2].lower()
    return float(match[1].replace("_", "")), unit[:-1] if unit.endswith("s") else unit


def parse_limit(text: str) -> Limit:
    """Read when a run ends.

    Args:
        text: an amount and a unit: ``"500 steps"``, ``"1e9 tokens"``, ``"3 epochs"``,
            ``"10 minutes"``.

    Raises:
        ConfigError: not of that form, not positive, or a fraction of a step or token.
    """
    value, unit = _amount(text)
    if unit not in _UNITS:
        raise ConfigError(
            f"train.limit is {text!r}; write an amount and a unit, e.g. "
            '"500 steps", "1e9 tokens", "3 epochs" or "10 minutes".'
        )
    kind, factor = _UNITS[unit]
    value *= factor
    if not 0 < value < 1e18 or (kind in ("steps", "tokens") and value != int(value)):
        need = "a positive whole number" if kind in ("steps", "tokens") else "a positive number"
        raise ConfigError(f"train.limit is {text!r}; it must be {need} of {kind} below 1e18.")
    return Limit(kind, int(value) if kind in ("steps", "tokens") else value)


def parse_every(
    text: str, total: int, key: str = "train.eval_every", epoch_steps: float = 1.0
) -> int:
    """Read an interval and return it in steps; 0 is never.

    Args:
        text: ``"200 steps"``, ``"0.5 epochs"`` or a share of the run, ``"5%"``; the last two are at least one
            step.
        total: steps of the whole run.
        key: the setting that errors name.
        epoch_steps: steps in one epoch.

    Raises:
        ConfigError: not of that form.
    """
    value, unit = _amount(text)
    if unit == "step" and value == int(value) and value < 1e18:
        return int(value)
    share = {"%": total * value / 100, "epoch": epoch_steps * value}.get(unit, math.inf)
    if value < 1e18 and share < math.inf and not (unit == "%" and value > 100):
        return max(1, round(share)) if value else 0
    raise ConfigError(
        f'{key} is {text!r}; write "200 steps", "0.5 epochs" or a share of the run, e.g. "5%" '
        '("0 steps" is never).'
    )


@dataclass
class RunConfig:
    """The six sections of a run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    SECTIONS: ClassVar[dict[str, type]] = {
        "data": DataConfig,
        "model": ModelConfig,
        "objective": ObjectiveConfig,
        "optim": OptimConfig,
        "train": TrainConfig,
        "parallel": ParallelConfig,
    }

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str] | Mapping[str, Any] | RunConfig | None = None,
        overrides: Mapping[str, Any] | None = None,
    ) -> RunConfig:
        """Read settings and check every one of them.

        Args:
            source: a YAML file, a dict of sections, a RunConfig, or nothing (the defaults).
            overrides: what replaces settings of the source: sections
                (``{"optim": {"lr": 6e-4}}``) or dotted keys (``{"optim.lr": 6e-4}``). Fields of
                ``model.overrides`` and, while the objective stays the same, of
                ``objective.init_args`` are merged; everything else is replaced.

        Raises:
            ConfigError: a file that cannot be read, an unknown key (the nearest is named), a wrong
                type, an impossible value.
        """
        from pretrain.config.check import check_run, read_sections

        return cls(**read_sections(cls.SECTIONS, source, overrides, check_run))

    def validate(self) -> RunConfig:
        """Check every field again, e.g. after changing one in Python, and return the checked copy.

        Raises:
            ConfigError: as `load`.
        """
        return type(self).load(self)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The sections as plain dicts, lists, strings and numbers."""
        plain: dict[str, dict[str, Any]] = dataclasses.asdict(self)
        plain["optim"]["betas"] = list(plain["optim"]["betas"])
        return plain

    def to_yaml(self) -> str:
        """The settings as YAML that `load` reads back to an equal RunConfig."""
        from pretrain.config.strict_yaml import dump

        return dump(self.to_dict())

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write `to_yaml` with its digest to ``path``: a reader sees the whole old file or the whole new one.

        Raises:
            ConfigError: the file cannot be written.
        """
        from pretrain.config.check import with_digest, write_text

        return write_text(Path(path), with_digest(self.to_yaml()))


@dataclass(frozen=True)
class Field:
    """One setting as a command line or a page of documentation shows it."""

    name: str
    type: Any
    default: Any
    help: str


def fields(section: str | type) -> list[Field]:
    """The settings of a section (a name in `RunConfig`, or a dataclass); the help is the text under each field."""
    import ast
    import inspect
    import textwrap
    from typing import get_type_hints

    kind = RunConfig.SECTIONS[section] if isinstance(section, str) else section
    helps: dict[str, str] = {}
    with contextlib.suppress(OSError):  # no source at hand: no help texts
        body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
        lines = body.body if isinstance(body, ast.ClassDef) else []
        for line, text in itertools.pairwise(lines):
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                value = text.value if isinstance(text, ast.Expr) else None
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    helps[line.target.id] = " ".join(value.value.split())
    hints, defaults = get_type_hints(kind), kind()
    for spec in dataclasses.fields(kind):
        if "flag" in spec.metadata:
            hints[spec.name] |= bool
    return [
        Field(spec.name, hints[spec.name], getattr(defaults, spec.name), helps.get(spec.name, ""))
        for spec in dataclasses.fields(kind)
    ]
