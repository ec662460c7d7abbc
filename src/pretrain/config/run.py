"""The settings of a run: six sections, checked strictly, without importing torch.

Each section is one dataclass: data, model, objective, optimizer, training and parallelism. Its fields are the YAML
keys, the options of ``pretrain train`` and the keyword arguments of `pretrain.train`. Unknown settings, wrong types and
impossible values raise an error that names the setting, before anything is allocated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import glob
import itertools
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pretrain.config.check import (
    place_in,
    read_sections,
    types_of,
    with_digest,
    with_place,
    write_text,
)
from pretrain.config.strict_yaml import dump, parse
from pretrain.errors import ConfigError, DataError, PretrainError

__all__ = [
    "DataConfig",
    "Limit",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "ParallelConfig",
    "RunConfig",
    "TrainConfig",
    "began_without",
    "fields",
    "parse_every",
    "parse_limit",
]


def setting(
    default: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    resumable: bool = False,
    unit: str = "",
    path: bool = False,
) -> Any:
    """Return the dataclass field of a setting.

    Args:
        default: its default.
        low: smallest number that is allowed.
        high: largest number that is allowed.
        resumable: it may change when a run is resumed, because it affects only where and how long the run trains and
            what it reports and saves.
        unit: unit of a number alone, in a setting that is an amount with a unit.
        path: it is a path, in which ``~`` is the home directory.
    """
    limits = {"low": low, "high": high, "resumable": resumable, "path": path}
    return field(default=default, metadata=limits | ({"unit": unit} if unit else {}))


@dataclass
class DataConfig:
    """Training data."""

    train: Any = "python"
    """A prepared directory, or sources: a path, glob, folder, "hub:NAME" or "python" (the built-in
    corpus), a list of them, or {source: weight}."""
    source: str | None = None
    """Rows of another kind than text, instead of all other settings of this section: images, audio, or
    the import path of a function of your own that returns a pretrain.RowSource,
    "package.module:function"."""
    source_args: dict[str, Any] = field(default_factory=dict)
    """Arguments of that function; of images: train, valid, size, channels, seed, labels; of audio:
    train, valid, sampling_rate, bands, frames, patch, seed, labels."""
    valid: float | str = 0.01
    """Held-out text: a fraction of the documents, a source, or "last:0.1" (the last tenth of a
    single text)."""
    text: str | dict[str, str] = "text"
    """Column that holds the text in .jsonl, .csv, .tsv and .parquet files; {file: column} if they differ."""
    separator: str | None = None
    """Text that separates the documents of a file; if not given, every file or row is one document."""
    encoding: str | None = None
    """Encoding of text files and tables; UTF-8 if not given."""
    tokenizer: str = "bpe"
    """bpe, wordpiece or char (trained on the data), the path of a tokenizer or a checkpoint, or a name on the Hub
    (org/name), of which only the tokenizer is fetched."""
    vocab_size: int = setting(8192, 8, 1 << 22)
    """Vocabulary size of the tokenizer to train."""
    row_length: int = setting(512, 2, 1 << 20)
    """Tokens per row."""
    cache: str | None = setting(None, resumable=True)
    """Directory in which prepared data are cached."""
    workers: int | None = setting(None, 1, 4096, resumable=True)
    """Processes that prepare the data; one per core if not given."""


@dataclass
class ModelConfig:
    """Model architecture."""

    family: str = "qwen3"
    """gpt2, llama, mistral, qwen2, qwen3, bert, roberta, modernbert, or "package.module:Class"."""
    size: str = "auto"
    """Model size: tiny, mini, small, medium, base, large, xl; "?" shows parameters, memory, time and loss of each. auto
    goes by the training text: tiny below 5 million tokens, mini below 50, small below 1,000, medium below 5,000, base
    from there on; small for rows that are no text."""
    checkpoint: str | None = setting(None, path=True)
    """Checkpoint to start from, a directory or a model of the Hub (org/name); family and size are taken from it."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Fields of the family's own config, e.g. {num_layers: 6}."""


@dataclass
class ObjectiveConfig:
    """Training objective."""

    class_path: str = "NextToken"
    """NextToken, MaskedLM, or the import path of an objective of your own."""
    init_args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the objective, e.g. {rate: 0.3}."""


@dataclass
class OptimConfig:
    """Optimizer."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon (Muon for the matrices, AdamW for the rest)."""
    lr: float | Literal["auto"] = setting("auto", 0.0, 100.0)
    """Peak learning rate of AdamW; "auto" chooses it by the width of the model."""
    muon_lr: float = setting(0.02, 0.0, 100.0)
    """Peak learning rate of Muon."""
    betas: tuple[float, float] = setting((0.9, 0.95), 0.0, 1.0 - 1e-9)
    """Decay of the two moments of AdamW."""
    eps: float = setting(1e-8, 1e-30, 1.0)
    """Added to the square root of the second moment."""
    weight_decay: float = setting(0.1, 0.0, 100.0)
    """Decoupled weight decay of matrices and convolutions (not of norms, biases, embeddings, positions, tokens)."""
    cautious: bool = False
    """Decay a weight only where the update has its sign, that is, where the update brings it nearer to zero too."""
    clip: float = setting(1.0, 0.0, 1e6)
    """Maximum gradient norm; 0 disables clipping."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Learning-rate schedule after the warm-up; wsd is warm-up, stable, decay."""
    warmup: float = setting(0.02, 0.0, 1e9)
    """Warm-up: a fraction of the steps (below 1) or a number of steps."""
    decay: float = setting(0.4, 0.0, 1.0)
    """Fraction of the steps in the decay phase (wsd)."""
    min_lr: float = setting(0.1, 0.0, 1.0)
    """Final learning rate, as a fraction of the peak."""
    ema: float = setting(0.0, 0.0, 1.0 - 1e-9)
    """Decay of the exponential moving average of the weights; 0 disables it."""
    layer_decay: float = setting(1.0, 1e-6, 1.0)
    """Learning rate of every layer as a fraction of that of the layer above it (down to the embeddings); 1 is off."""
    unfreeze: float = setting(0.0, 0.0, 1.0)
    """Fraction of the steps over which the layers are unfrozen one by one from the top (gradual
    unfreezing): the head first, the embeddings last; 0 trains all layers from the start."""
    l2_sp: float = setting(0.0, 0.0, 1e9)
    """Strength of L2-SP: loaded weights decay towards their initial values instead of zero; 0 disables it."""


@dataclass
class TrainConfig:
    """Length of the run, batches, evaluation, checkpoints and logging."""

    out: str = setting("", resumable=True, path=True)
    """Directory of the run; repeating the command resumes it. By default runs/FAMILY-SIZE-FINGERPRINT."""
    limit: str = setting("auto", resumable=True, unit="steps")
    """When to stop: "500 steps" or 500, "1e9 tokens", "3 epochs" or "10 minutes"; auto is one epoch, or as many as give
    500 steps, at most ten."""
    batch_rows: int = setting(0, 0, 1 << 24)
    """Rows per optimizer step, over all devices and micro-batches (global batch); 0 is automatic: 32, or 16 or 8 where
    an epoch would have fewer than 32 steps."""
    micro_rows: int = setting(0, 0, 1 << 24, resumable=True)
    """Rows per forward pass of one process (micro-batch); 0 is automatic: on a CPU about 8,192 tokens, always the
    same; on a GPU the fastest of a few sizes that fit, measured before the first step of a run that is long enough
    and kept when it is resumed. Two runs of one command may then differ in the last bits and the draws of dropout."""
    eval_every: str = setting("auto", resumable=True, unit="steps")
    """Evaluate every "200 steps" or 200, "0.5 epochs" or "5%" of the run; 0 is only at the end; auto is 5%
    or 10 steps, whichever is more, and ten times in a run of less than 100 steps; if train.monitor is the loss,
    less often, down to eight times, where evaluations would be more than a fifth of the work."""
    eval_rows: int = setting(0, 0, 1 << 40, resumable=True)
    """Held-out rows per evaluation; 0 is all of them. A run that goes on with another number begins its best afresh."""
    save_every: str = setting("10%", resumable=True, unit="steps")
    """Save every "200 steps" or 200, "0.5 epochs" or "10%" of the run; 0 is only at the end."""
    async_save: bool = setting(False, resumable=True)
    """Write checkpoints in the background: training stalls only for a copy, which takes additional memory."""
    keep: int = setting(2, 1, 1 << 20, resumable=True)
    """Number of checkpoints to keep, besides the best."""
    best: bool = setting(True, resumable=True)
    """Keep the checkpoint that is best on the held-out rows by train.monitor."""
    monitor: str = "loss"
    """Held-out metric that selects the best checkpoint and drives early stopping: lower is better for loss,
    perplexity, bits_per_byte, mse, rmse and mae, higher for all others. Ties are resolved by the lower
    loss. The last evaluation counts as the best unless an earlier one is better by more than one standard
    error of a proportion of the targets; losses are compared as they are."""
    patience: int = setting(0, 0, 1 << 20, resumable=True)
    """Evaluations without improvement before stopping; 0 disables early stopping."""
    log_every: int = setting(10, 1, 1 << 30, resumable=True)
    """Steps between two lines of the log."""
    sample: str = setting("", resumable=True)
    """Prompt of the sample shown at every evaluation; if empty, taken from the held-out rows."""
    loggers: list[Literal["tensorboard", "wandb", "trackio"]] = field(
        default_factory=list, metadata={"resumable": True}
    )
    """Loggers besides log.jsonl: tensorboard, wandb, trackio."""
    precision: Literal["auto", "bf16", "fp16", "fp32", "fp8"] = "auto"
    """Compute precision; auto is bf16 where the hardware has fast bf16. fp8 is bf16 with the matrix products of the
    blocks in float8."""
    eval_precision: Literal["fp32", "train"] = setting("fp32", resumable=True)
    """Precision of evaluations: fp32, in which metrics do not depend on how rows are batched, or train, the
    precision of training, which is faster."""
    seed: int = setting(0, 0, (1 << 63) - 1)
    """Seed of the weights, the data order, the masks and the dropout."""
    recut: bool = True
    """Cut documents that are longer than a row at other places in every epoch after the first, so that their tokens
    are predicted from other contexts. Every token is still visited once an epoch."""


@dataclass
class ParallelConfig:
    """Device and parallelism."""

    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", resumable=True)
    """Device: auto, cpu, cuda or mps."""
    compile: bool | Literal["auto"] = setting("auto", resumable=True)
    """Compile the blocks with torch.compile; auto does on CUDA in runs that are long enough to pay for it."""
    activation_checkpointing: Literal["off", "selective", "full"] = field(
        default="off", metadata={"flag": {True: "full", False: "off"}, "resumable": True}
    )
    """Recompute activations in the backward pass to save memory: off, selective (the cheap half of a block) or full."""
    threads: int = setting(0, 0, 4096, resumable=True)
    """CPU threads per process; 0 is the default of torch, or an equal share of the cores with several processes."""
    strategy: Literal["auto", "ddp", "fsdp"] = setting("auto", resumable=True)
    """ddp (every process holds the model), fsdp (the model is sharded), or auto: ddp if the model fits into memory."""
    dp_replicate: int = setting(0, 0, 1 << 20, resumable=True)
    """Replicas of the model, which get different rows; 0 is as many as the remaining processes allow."""
    dp_shard: int = setting(0, 0, 1 << 20, resumable=True)
    """Processes over which a replica is sharded, and which get different rows (fsdp); 0 is automatic."""
    tp: int = setting(1, 1, 1 << 20, resumable=True)
    """Processes over which each matrix is sharded, and which get the same rows (tensor parallelism)."""
    cpu_offload: bool = setting(False, resumable=True)
    """Keep sharded weights and moments in host memory (fsdp on CUDA): saves GPU memory, but is slow."""
    reproducible: bool = False
    """Bitwise equal results on any power-of-two number of processes: slower reductions, and ddp only."""
    timeout: float = setting(300.0, 1.0, 1e6, resumable=True)
    """Seconds without progress after which a process counts as hung and the run ends with an error."""

    def __post_init__(self) -> None:
        given: Any = self.activation_checkpointing
        if isinstance(given, bool):
            self.activation_checkpointing = "full" if given else "off"


@dataclass(frozen=True)
class Limit:
    """Limit of a run: ``value`` of ``kind``; a whole number for steps and tokens."""

    kind: Literal["steps", "tokens", "epochs", "minutes"]
    value: float

    def __str__(self) -> str:
        return f"{self.value:g} {self.kind}"


_AMOUNT = re.compile(
    r"\s*([0-9][0-9_]*(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?|\.[0-9]+)\s*([A-Za-z]+|%|)\s*"
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
    """Split "500 steps" or 500 into (500.0, "step"); (nan, "") when it is not an amount."""
    number = isinstance(text, int | float) and not isinstance(text, bool)
    match = _AMOUNT.fullmatch(str(text)) if number or isinstance(text, str) else None
    if match is None:
        return math.nan, ""
    unit = match[2].lower() or "step"
    return float(match[1].replace("_", "")), unit[:-1] if unit.endswith("s") else unit


def parse_limit(text: str) -> Limit:
    """Parse the limit of a run.

    Args:
        text: an amount and a unit: ``"500 steps"``, ``"1e9 tokens"``, ``"3 epochs"``,
            ``"10 minutes"``; a number alone is one of steps. "auto" is replaced before, by the rows of the run.

    Raises:
        ConfigError: the text is not of that form, not positive, or a fraction of a step or token.
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
    text: str,
    total: int,
    key: str = "train.eval_every",
    epoch_steps: float = 1.0,
    evaluation: float = 0.0,
) -> int:
    """Parse an interval and return it in steps; 0 is never.

    Args:
        text: ``"200 steps"``, ``"0.5 epochs"`` or a share of the run, ``"5%"``; the last two are at least one
            step; a number alone is one of steps. ``"auto"``, of evaluations, is 5 %, or 10 steps or 10 % if short,
            and longer, up to an eighth of the run, where evaluations would be more than a fifth of the work.
        total: steps of the whole run.
        key: name of the setting in errors.
        epoch_steps: steps in one epoch.
        evaluation: work of one evaluation, in steps; 0 if it does not matter.

    Raises:
        ConfigError: the text is not of that form.
    """
    if text == "auto" and key == "train.eval_every":
        worth = min(math.ceil(5 * evaluation), total // 8)
        return max(1, round(total / 20), min(10, math.ceil(total / 10)), worth)
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


class Sections:
    """Settings in sections: reading, checking and writing, for pre-training and fine-tuning runs.

    Attributes:
        origins: item of a mapping of any names (``task.options.x``) -> its place in a file (``FILE:LINE``).
    """

    SECTIONS: ClassVar[dict[str, type]]
    origins: ClassVar[dict[str, str]] = {}  # of each object that was loaded

    @classmethod
    def load(
        cls,
        source: str
        | os.PathLike[str]
        | Mapping[str, Any]
        | Sections
        | Sequence[str | os.PathLike[str]]
        | None = None,
        overrides: Mapping[str, Any] | None = None,
    ) -> Self:
        """Read settings and check every one of them.

        Args:
            source: a YAML file, a dict of sections, settings of this class, a list of files, each of which replaces
                settings of those before it as ``overrides`` do, or None (the defaults).
            overrides: settings that replace those of the source: sections
                (``{"optim": {"lr": 6e-4}}``) or dotted keys (``{"optim.lr": 6e-4}``). Items of settings that are
                mappings of any names (``model.overrides``, ``task.options``) are merged, those of
                ``objective.init_args`` while the objective stays the same; everything else is replaced.

        Raises:
            ConfigError: the file cannot be read, a key is unknown (the nearest one is named), or a value
                has the wrong type or is out of range.
        """
        sections, origins = read_sections(cls.SECTIONS, source, overrides)
        settings = cls(**sections)
        vars(settings)["origins"] = origins
        settings.check()
        return settings

    def check(self) -> None:
        """Check what the type and range of a single field do not cover.

        Raises:
            ConfigError: a value is impossible by itself or with another.
        """

    def validate(self) -> Self:
        """Check every field again, e.g. after changing one in Python, and return the checked copy.

        Raises:
            ConfigError: as `load`.
        """
        return type(self).load(self)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return the sections as plain dicts, lists, strings and numbers."""
        plain: dict[str, dict[str, Any]] = dataclasses.asdict(self)  # type: ignore[call-overload]
        for section, kind in self.SECTIONS.items():
            for spec in dataclasses.fields(kind):
                value = plain[section].pop(spec.name)
                if spec.init:
                    plain[section][spec.name] = list(value) if isinstance(value, tuple) else value
        return plain

    def to_yaml(self) -> str:
        """Return the settings as YAML that `load` reads back to equal settings."""
        return dump(self.to_dict())

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write `to_yaml` with its digest and the current directory to ``path``, atomically.

        Raises:
            ConfigError: the file cannot be written.
        """
        target = Path(os.path.expanduser(path))
        return write_text(target, with_digest(with_place(self.to_yaml())))

    @classmethod
    def of_run(cls, run_dir: Path) -> Self:
        """Read the settings of a run to open its data again, from any directory.

        A relative path of rows or of a model that leads nowhere from here leads from where the run was started.

        Raises:
            ConfigError: as `load`.
        """
        settings = cls.load(run_dir / "run.yaml")
        place = place_in((run_dir / "run.yaml").read_text(encoding="utf-8"))
        for section, name in _PATHS:
            part = getattr(settings, section)
            if place is not None and hasattr(part, name):
                setattr(part, name, _resolved_from(place, getattr(part, name)))
        return settings

    def paths(self) -> list[str]:
        """Return the texts that may be paths of rows or of a model."""
        parts = [getattr(getattr(self, section), name, None) for section, name in _PATHS]
        return [text for part in parts for text in _texts(part)]


def began_without(path: Path, setting: str) -> bool:
    """Return whether a version that did not have this setting, ``section.name``, wrote the settings of a run."""
    section, _, name = setting.partition(".")
    return name not in (parse(path.read_text(encoding="utf-8"), str(path))[0].get(section) or {})


# Settings that may be paths: one, several, or {source: weight}; of source_args the values.
_PATHS = (
    *(("data", name) for name in ("train", "valid", "test", "source_args")),
    ("model", "checkpoint"),
)


def is_lost(path: str) -> bool:
    """Whether a text is a relative path or a pattern, and no file is there from here."""
    place = Path(os.path.expanduser(path))
    return (
        not place.is_absolute()
        and not os.path.exists(place)
        and not glob.glob(path, recursive=True)
    )


@contextlib.contextmanager
def naming_paths(run_dir: Path, settings: Sections) -> Iterator[None]:
    """Say of an error inside the block that a path of a run does not lead from here, where that is the cause.

    Args:
        run_dir: directory of the run.
        settings: its settings, as ``of_run`` read them.

    Raises:
        DataError: in place of an error that names a relative path of the settings which does not exist.
    """
    try:
        yield
    except PretrainError as error:
        lost = [path for path in settings.paths() if is_lost(path) and path in str(error)]
        if not lost:
            raise
        raise DataError(
            f"{lost[0]!r}, which {run_dir / 'run.yaml'} names, is not there. It is relative to the directory in which "
            f"the run was started, and the command runs in {Path.cwd()}: run it there, or put the file back."
        ) from error


def _resolved_from(place: Path, value: Any) -> Any:
    """Return relative paths that do not exist here, but below ``place``, as paths below ``place``."""
    if isinstance(value, Mapping):
        weights = all(isinstance(one, float) for one in value.values())
        return {
            _resolved_from(place, k) if weights else k: _resolved_from(place, v)
            for k, v in value.items()
        }
    if isinstance(value, list):
        return [_resolved_from(place, one) for one in value]
    if not isinstance(value, str) or not value or value == DataConfig.train or not is_lost(value):
        return value
    moved = str(place / value)
    return value if not os.path.exists(moved) and not glob.glob(moved, recursive=True) else moved


def _texts(value: Any) -> list[str]:
    """Return all texts in a value, keys of mappings included."""
    if isinstance(value, Mapping):
        return [text for pair in value.items() for one in pair for text in _texts(one)]
    if isinstance(value, list):
        return [text for one in value for text in _texts(one)]
    return [value] if isinstance(value, str) and value else []


def sections_of(kind: Any) -> dict[str, type]:
    """Return section -> its dataclass, for a dataclass of sections."""
    return {spec.name: spec.default_factory for spec in dataclasses.fields(kind)}  # type: ignore[misc]


@dataclass
class RunConfig(Sections):
    """The six sections of a run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    @classmethod
    def of_run(cls, run_dir: Path) -> Self:
        """See `Sections.of_run`; a run of an earlier version cut its documents once."""
        settings = super().of_run(run_dir)
        if began_without(run_dir / "run.yaml", "train.recut"):
            settings.train.recut = False
        return settings

    def check(self) -> None:
        """See `Sections.check`."""
        data, train, name = self.data, self.train, self.objective.class_path
        if train.limit != "auto":
            parse_limit(train.limit)
        for key in ("eval_every", "save_every"):
            parse_every(getattr(train, key), 100, f"train.{key}")
        if train.micro_rows > train.batch_rows > 0:
            raise ConfigError(
                f"train.micro_rows is {train.micro_rows}, more than train.batch_rows ({train.batch_rows})."
            )
        if isinstance(data.valid, float) and not 0 <= data.valid < 1:
            raise ConfigError(
                f"data.valid is {data.valid}; as a fraction it must lie between 0 and 1."
            )
        if train.out and not train.out.strip():
            raise ConfigError("train.out is blank; name the directory of the run.")
        if not all(part.isidentifier() for part in name.replace(":", ".", 1).split(".")):
            raise ConfigError(
                f"objective.class_path is {name!r}; write a name or package.module:Class."
            )


RunConfig.SECTIONS = sections_of(RunConfig)


@dataclass(frozen=True)
class Field:
    """One setting, as the command line and the documentation show it."""

    name: str
    type: Any
    default: Any
    help: str
    metadata: Mapping[str, Any]


def fields(section: str | type) -> list[Field]:
    """Return the settings of a section (a name in `RunConfig`, or a dataclass), its own before inherited ones.

    The help is the docstring of the attribute, or that of the class from which a setting is inherited.
    """
    import inspect

    kind = RunConfig.SECTIONS[section] if isinstance(section, str) else section
    helps: dict[str, str] = {}
    order: dict[str, None] = {}
    for of in kind.__mro__[:-1]:
        order |= dict.fromkeys(inspect.get_annotations(of))
        helps = _docstrings(of.__module__).get(of.__qualname__, {}) | helps
    hints, defaults = types_of(kind), kind()
    specs = {spec.name: spec for spec in dataclasses.fields(kind) if spec.init}
    return [
        Field(n, hints[n], getattr(defaults, n), helps.get(n, ""), specs[n].metadata)
        for n in order
        if n in specs
    ]


@functools.cache
def _docstrings(module: str) -> dict[str, dict[str, str]]:
    """Return class -> attribute -> docstring of a module; nothing where its source cannot be had."""
    import ast
    import inspect

    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError, KeyError):
        return {}
    found: dict[str, dict[str, str]] = {}
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        helps = found[node.name] = {}
        for line, text in itertools.pairwise(node.body):
            match line, text:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(words))),
                ):
                    helps[name] = " ".join(words.split())
    return found
