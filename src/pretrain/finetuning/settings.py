"""Settings of a fine-tuning run: sections like those of a pre-training run, with a task and a method.

The same fields are the YAML keys, the options of ``pretrain finetune`` and, without their section, the keyword
arguments of ``pretrain.finetune``. Section ``parallel`` is that of pre-training.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pretrain.config import OptimConfig, ParallelConfig, TrainConfig, parse_every, parse_limit
from pretrain.config.run import Sections, sections_of, setting
from pretrain.config.spelling import option, option_name
from pretrain.data.readers import table_kind
from pretrain.errors import ConfigError

__all__ = ["TuneConfig", "from_memory", "rate_of_muon"]


@dataclass
class TuneData:
    """Training, validation and test rows."""

    train: str | None = None
    """Training rows: .csv .tsv .jsonl .json .parquet .conll (also .gz); in Python also a list of dicts, a
    pandas frame or a datasets.Dataset."""
    valid: float | str = 0.1
    """Validation rows: a fraction of the training rows, stratified by class, or a separate source."""
    test: str | None = None
    """Test rows, which are evaluated once, after all choices have been made."""
    columns: dict[str, Any] = field(default_factory=dict)
    """Column of each role, e.g. {text: review, label: stars}, or {label: [toxic, obscene]} for one column per
    label; other columns are recognised by name."""
    names: list[str] | None = None
    """Names of the columns of a file without a header line, or of rows that are tuples."""
    format: str | None = None
    """Format of a file whose name does not show it: csv, tsv, jsonl, json, parquet, conll, conllu."""
    delimiter: str | None = None
    """Delimiter of the cells of a .csv or .tsv file, e.g. ";"; by default a comma or a tab."""
    quoting: bool | None = None
    """Whether double quotes enclose cells of a .csv or .tsv file; by default it is detected."""
    encoding: str | None = None
    """Encoding of text files, e.g. cp1252; by default that of a byte order mark, else UTF-8."""
    group: str | None = None
    """Column of groups, such as patient, author or template; a group stays whole when validation rows are split off."""
    max_length: int | None = setting(None, 3, 1 << 20)
    """Maximum tokens of an example; by default the model's positions."""
    max_cut: float = setting(0.01, 0.0, 1.0)
    """Share of the rows that may be truncated to max_length; more is an error."""

    def reading(self, source: Any) -> dict[str, Any]:
        """Arguments of ``read_table`` for one of the sources: the settings that apply to files of its kind."""
        if not isinstance(source, str | os.PathLike):
            return {}
        kind = table_kind(Path(source))
        # A file whose name shows another format than that of the training rows is read in that format.
        other = kind and kind != table_kind(Path(self.train or ""))
        options: dict[str, Any] = {"encoding": self.encoding}
        options["format"] = None if other else self.format
        if (options["format"] or kind or "csv") in ("csv", "tsv"):
            options |= {"columns": self.names, "delimiter": self.delimiter, "quoting": self.quoting}
        return options


@dataclass
class TuneModel:
    """Model to fine-tune."""

    checkpoint: str = ""
    """A run, a checkpoint, any Hugging Face directory of a known family, or a model of the Hub: org/name."""
    family: str | None = None
    """package.module:Class of the checkpoint, if it is a family of your own."""


@dataclass
class TuneTask:
    """Task to fine-tune for."""

    name: str = ""
    """classification, regression, token-classification, question-answering, chat, language-modelling,
    embedding, preference, image-classification, audio-classification, segmentation, object-detection,
    image-text-retrieval, captioning, or the import path of a custom task."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the task, e.g. {label_smoothing: 0.1, class_weights: balanced}."""


@dataclass
class TuneMethod:
    """Trainable weights: all of them, an adapter, or a part."""

    lora: int = setting(0, 0, 1 << 16)
    """Rank of a LoRA adapter; 0 trains the weights themselves."""
    alpha: float | None = setting(None, 1e-9, 1e9)
    """The adapter is scaled by alpha / rank; by default alpha is twice the rank."""
    lora_dropout: float = setting(0.0, 0.0, 0.99)
    """Dropout on the input of the adapter."""
    dora: bool = False
    """Train the norm of every weight row separately from its direction (DoRA)."""
    targets: list[str] | str | None = None
    """Modules that get an adapter, by the last part of their name in the file, or "all-linear"."""
    freeze: str | int = ""
    """Part to freeze: "backbone", "embeddings", or the number of lowest blocks (with the embeddings)."""


def _fixed(value: Any) -> Any:
    """Return the dataclass field of an inherited setting that fine-tuning does not offer."""
    return field(default=value, init=False, repr=False)


@dataclass
class TuneOptim(OptimConfig):
    """Optimizer."""

    lr: float | str = "auto"  # type: ignore[assignment]
    """Peak learning rate; "auto" derives it from the model's width and depth, "sweep" tries a grid in short runs."""
    lrs: list[float] = field(default_factory=list)
    """Learning rates of the sweep, and of both arms of a comparison; by default 1/3, 1 and 3 times the automatic
    one, in a comparison 1 and 3 times. The rate of Muon, muon_lr, changes in proportion."""
    muon_lr: float = setting(0.002, 0.0, 100.0)
    betas: tuple[float, float] = setting((0.9, 0.999), 0.0, 1.0 - 1e-9)
    weight_decay: float = setting(0.01, 0.0, 100.0)
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "linear"
    warmup: float = setting(0.1, 0.0, 1e9)
    decay: float = _fixed(0.4)
    min_lr: float = setting(0.0, 0.0, 1.0)

    def at(self, rates: Mapping[str, float]) -> OptimConfig:
        """Return the trainer's section, with these learning rates (``lr``, and ``muon_lr`` if it changes)."""
        names = [spec.name for spec in dataclasses.fields(OptimConfig)]
        return OptimConfig(**{name: getattr(self, name) for name in names} | dict(rates))


def rate_of_muon(rates: Mapping[str, float]) -> str:
    """Return the chosen learning rate of Muon as a phrase to append to that of AdamW; "" without Muon."""
    return f", Muon lr {rates['muon_lr']:g}" if "muon_lr" in rates else ""


@dataclass
class TuneTrain(TrainConfig):
    """Length of the run, batches, evaluation and logging."""

    out: str = setting("", resumable=True, path=True)
    """Directory of the run; repeating the command resumes it. By default runs/TASK-FINGERPRINT."""
    epochs: float = setting(0.0, 0.0, 1e6, resumable=True)
    """Passes over the training rows; 0 is three, or more if that is fewer than 500 steps (at most twenty
    passes or 100 steps, whichever is more)."""
    limit: str = setting("", resumable=True, unit="steps")
    """Length of the run in place of epochs: "500 steps" or 500, "1e6 tokens" or "10 minutes"."""
    batch_rows: int = setting(32, 1, 1 << 24)
    """Rows per optimizer step, over all devices and micro-batches (global batch)."""
    eval_every: str = setting("1 epochs", resumable=True, unit="steps")
    """Evaluate every "1 epochs", "200 steps" or "5%" of the run; "1 epochs" is at most
    twenty times in a run of steps."""
    patience: int = setting(0, 0, 1 << 20, resumable=True)
    """Evaluations without improvement before stopping; 0 disables early stopping. The best evaluation is restored
    in any case."""
    monitor: str = ""
    """Metric that selects the best evaluation; by default that of the task. Ties are resolved by the lower loss.
    The last evaluation counts as the best unless an earlier one is better by more than chance."""
    seed: int = setting(0, 0, (1 << 63) - 1)
    """Seed of the new head, the split, the data order and dropout."""
    eval_rows: int = _fixed(0)
    save_every: str = _fixed("25%")
    async_save: bool = _fixed(False)
    keep: int = _fixed(1)
    best: bool = _fixed(True)
    sample: str = _fixed("")
    recut: bool = _fixed(True)

    def at(self, out: str, limit: str, *, save: bool) -> TrainConfig:
        """Return the trainer's section."""
        names = [spec.name for spec in dataclasses.fields(TrainConfig)]
        given = {"out": out, "limit": limit, "best": save}
        given |= {} if save else {"save_every": "0 steps"}
        return TrainConfig(**{name: getattr(self, name) for name in names} | given)


@dataclass
class TuneConfig(Sections):
    """The sections of a fine-tuning run."""

    data: TuneData = field(default_factory=TuneData)
    model: TuneModel = field(default_factory=TuneModel)
    task: TuneTask = field(default_factory=TuneTask)
    method: TuneMethod = field(default_factory=TuneMethod)
    optim: TuneOptim = field(default_factory=TuneOptim)
    train: TuneTrain = field(default_factory=TuneTrain)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def spell(self, name: str) -> str:
        """Return an option of the task as it was given: in a file, or in the interface that is used."""
        key = f"task.options.{name}"
        origin = self.origins.get(key)
        return option_name(name) if origin is None else f"{origin}: {key}"

    def check(self) -> None:
        """See `Sections.check`."""
        data, lr, train = self.data, self.optim.lr, self.train
        if isinstance(lr, str) and lr not in ("auto", "sweep"):
            raise ConfigError(
                f'{option_name("lr")} is {lr!r}; it must be a number, "auto" or "sweep".'
            )
        if not isinstance(lr, str) and not 0 < lr < math.inf:
            raise ConfigError(f"{option_name('lr')} is {lr}; it must be above 0.")
        if wrong := [rate for rate in self.optim.lrs or () if not 0 < rate < math.inf]:
            raise ConfigError(f"{option_name('lrs')} holds {wrong[0]}; rates must be above 0.")
        if isinstance(data.valid, float) and not 0 <= data.valid < 1:
            raise ConfigError(
                f"{option_name('valid')} is {data.valid}; as a share of the rows it must lie between 0 and 1."
            )
        if train.limit:
            parse_limit(train.limit)
        parse_every(train.eval_every, 100, "train.eval_every")


TuneConfig.SECTIONS = sections_of(TuneConfig)


def check_idle(settings: TuneConfig, problem: str | None) -> None:
    """Refuse settings of a new run that would do nothing; those of a run that is there are read as they are.

    ``problem`` is the kind of a classification, ``single_label`` or ``multi_label``, else None.

    Raises:
        ConfigError: names the setting.
    """
    method = settings.method
    without = {
        "dora": method.dora,
        "alpha": method.alpha is not None,
        "lora_dropout": bool(method.lora_dropout),
        "targets": bool(method.targets),
    }
    if idle := [name for name, is_set in without.items() if is_set and not method.lora]:
        raise ConfigError(
            f"{option_name(idle[0])} is a setting of an adapter, and there is none. Set its rank, "
            f"{option('lora', 8)}, or leave it out."
        )
    if (
        isinstance(settings.data.valid, int | float)
        and not settings.data.valid
        and settings.train.patience
    ):
        raise ConfigError(
            f"{option_name('patience')} stops by evaluations, and there are no held-out rows. Give some, "
            f"{option('valid', 0.1)}, or leave it out."
        )
    if problem == "single_label" and "threshold" in settings.task.options:
        raise ConfigError(
            f"{option_name('threshold')} is for texts that may have several classes, and here each has one. Leave it "
            "out."
        )


def from_memory(value: Any) -> bool:
    """Whether a setting replaces an object that was given instead of a path: "a DataFrame", "a model"."""
    return isinstance(value, str) and value.startswith("a ") and not os.path.exists(value)
