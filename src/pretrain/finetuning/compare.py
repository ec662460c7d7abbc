"""Comparison with training from scratch, on the same rows, budget and seeds, and with classical baselines.

Each arm is tuned separately: all of its learning rates are run with all seeds, the one with the best mean on the
held-out rows is chosen, and its scores on the test rows are compared seed by seed. Without test rows the held-out
rows are halved, one half for the choice and one for the scores. Both arms have the same number of optimizer steps. The
saved model is trained at the learning rate chosen for the pre-trained arm; if that rate is already fixed, by the user
or because the run has begun, the arm is trained only at this rate.

The scores are paired by seed, and the gain is the mean of the paired differences with Student's t interval (Student,
1908). A verdict requires both the interval and four of five seeds on one side of 0. Classical baselines at the same
labels are reported beside the two arms, because a gain over a badly trained model is worth nothing; the verdict names
a baseline that is better.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pretrain.checkpoint.best import COMPARISON
from pretrain.config import parse_limit
from pretrain.config.spelling import option, option_name
from pretrain.errors import (
    ConfigError,
    DataError,
    PretrainError,
)
from pretrain.finetuning import baseline
from pretrain.finetuning.settings import rate_of_muon
from pretrain.finetuning.trials import ScoreFile, trials_key
from pretrain.metrics import mean_interval, student_t
from pretrain.printing import aligned
from pretrain.report.history import read_history
from pretrain.training.validation import LOWER_IS_BETTER
from pretrain.utils.curves import Series, curve_svg
from pretrain.utils.files import muted, note
from pretrain.utils.html import bullets, notebook_view, table
from pretrain.utils.strict_json import parse_json, without_nan

if TYPE_CHECKING:
    from pretrain.data.tables import Table
    from pretrain.finetuning.job import Job
    from pretrain.finetuning.settings import TuneConfig

__all__ = [
    "PRETRAINED",
    "SCRATCH",
    "Comparison",
    "Gain",
    "Notes",
    "check_comparison",
    "compare_arms",
    "stratified_subset",
]

_FACTORS = (1.0, 3.0)  # factors on the automatic learning rate, the same for both arms
PRETRAINED, SCRATCH = "pretrained", "scratch"
_SHORT = {
    PRETRAINED: "pre-trained",
    SCRATCH: "from scratch",
    "tfidf": "TF-IDF",
    "lsa": "LSA",
    "probe": "frozen",
    "pixels": "pixels",
    "colours": "colours",
    "mel": "log-mel",
}
# Baselines under a linear model.
_LINEAR = ("tfidf", "lsa", "probe", "pixels", "colours", "mel")
_TOKENS = "tokens"
_EQUAL = 1e-9  # spread that is rounding of floats alone
_FEW_SEEDS = 3  # with fewer, an interval of any realistic spread contains 0
# A gain that this many times the seeds would show is not reported as no difference.
_WORTH_TRYING = 4
_MOST_SEEDS = 100
_HINTS = "try a lower learning rate, optim.layer_decay or optim.l2_sp"
_TEXT_HINTS = (
    ', go on pre-training on this text (task="language-modelling") before fine-tuning, and look whether the tokenizer '
    "fits the text (tokens per word)"
)


def stratified_subset(keys: Sequence[Hashable], count: int, seed: int) -> list[int]:
    """Choose ``count`` rows with every class in its share, as nearly as whole rows allow.

    Args:
        keys: class of each row.
        count: number of rows to choose.
        seed: seed of the choice among the rows of a class.

    Raises:
        DataError: there are fewer rows.
    """
    if count > len(keys):
        raise DataError(
            f"A comparison with {count:,} training rows was requested, and there are {len(keys):,}: request fewer."
        )
    rng = np.random.default_rng([seed, count])
    groups: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    exact = [count * len(rows) / len(keys) for rows in groups.values()]
    take = [min(len(rows), int(x)) for rows, x in zip(groups.values(), exact, strict=True)]
    # Rows left over by rounding go to the classes that lost most by it; ties are broken at random.
    order = sorted(range(len(take)), key=lambda g: (take[g] - exact[g], rng.random()))
    for g in order[: count - sum(take)]:
        take[g] += 1
    chosen: list[int] = []
    for rows, n in zip(groups.values(), take, strict=True):
        chosen += [rows[int(i)] for i in rng.permutation(len(rows))[:n]]
    return sorted(chosen)


def check_comparison(
    compare: str, settings: TuneConfig, label_counts: Sequence[int] | None, seeds: int
) -> None:
    """Refuse a comparison that cannot be made, before the rows are read.

    Raises:
        ConfigError: names the setting.
    """
    if compare != "scratch":
        raise ConfigError(
            f"{option_name('compare')} is {compare!r}; the only comparison is {option('compare', 'scratch')}."
        )
    listed = isinstance(label_counts, Sequence) and not isinstance(label_counts, str)
    if label_counts is not None and not (listed and all(_is_count(n) for n in label_counts)):
        raise ConfigError(
            f"{option_name('label_counts')} is {label_counts!r}; it must be a list of whole numbers of training rows, "
            f"each at least 1: {option('label_counts', [50, 200])}."
        )
    if not _is_count(seeds) or seeds < 2:
        raise ConfigError(
            f"{option_name('seeds')} is {seeds!r}; the interval of a gain over seeds needs a whole number of them, at "
            f"least 2, better 5: {option('seeds', 5)}."
        )
    if settings.train.limit and parse_limit(settings.train.limit).kind == "minutes":
        raise ConfigError(
            f"{option_name('limit')} is {settings.train.limit!r}: in a time each model of a comparison would take "
            f"another number of steps, and all need the same. Give steps, {option('limit', '500 steps')}, or passes "
            f"over the rows, {option('limit', '3 epochs')}."
        )


def _is_count(value: Any) -> bool:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return whole and bool(value >= 1)


def compare_arms(job: Job, label_counts: Sequence[int] | None, seeds: int) -> Comparison:
    """Train both arms and the baselines at every number of labels, and set the chosen learning rate in the job.

    Trials that the run directory keeps are not trained again, and the comparison is kept there, see `ScoreFile`.

    Raises:
        DataError: too few held-out rows, or a label count above the number of rows.
    """
    train, choose, score = job.data.train, job.data.valid, job.data.test
    tested = score is not None
    if score is None:
        if len(choose) < 4:
            raise DataError(
                f"A comparison without test rows tunes on one half of the held-out rows and scores on the other, so "
                f"it needs at least 4, and there are {len(choose)}. Give test rows: {option('test')}, or hold out more."
            )
        score = choose.take(range(1, len(choose), 2))
        choose = choose.take(range(0, len(choose), 2))
    counts = _counts(label_counts, len(train), job.data.left_out)
    strata = job.task.learn(train, job.settings.task.options).strata or [0] * len(train)
    arms: dict[str, dict[int, list[float]]] = {}
    notes = Notes(
        data=job.data.names["train"],
        dropped=job.data.recurring.get("test" if tested else "valid", 0),
        scored_on="test" if tested else "held-out",
        valid_rows=len(choose),
    )
    notes.tokens, notes.seconds["pre-training"] = _pretraining(job)
    baselines, trials = _baselines(job), ScoreFile(Path(job.settings.train.out, COMPARISON))
    trials.begin(trials_key(job))
    for count in counts:
        subsets = [train.take(stratified_subset(strata, count, seed)) for seed in range(seeds)]
        for arm in (PRETRAINED, SCRATCH):
            rates, scores, seconds = _arm(job, arm, subsets, choose, score, trials)
            arms.setdefault(arm, {})[count] = scores
            chosen = {f"{name} at {count}": rate for name, rate in rates.items()}
            notes.settings.setdefault(arm, {}).update(chosen)
            words = f"lr {rates['lr']:g}{rate_of_muon(rates)}"
            if arm == PRETRAINED:  # the saved model is trained on all rows, the last count
                saved, notes.saved = rates, f"{words} on all {len(train):,} rows"
            notes.seconds[arm] = notes.seconds.get(arm, 0.0) + seconds
            shown = " ".join(f"{job.figure(x):.3f}" for x in scores)
            note(f"{arm} at {count:,} labels: {shown} ({words})")
        for name, fit in baselines.items():
            fits = []
            for seed, rows in enumerate(subsets):
                named = [job.task.named(part, job.data.learned) for part in (rows, choose, score)]
                columns = job.task.baseline_columns(*named)
                with trials.interrupts_explained():
                    fits.append(fit(*columns, metric=job.monitor, seed=seed))
            arms.setdefault(name, {})[count] = [result["score_test"] for result in fits]
            notes.settings.setdefault(name, {})[f"C at {count}"] = [result["C"] for result in fits]
    notes.unit = job.unit
    for by_count in arms.values():
        by_count.update({n: [job.figure(x) for x in scores] for n, scores in by_count.items()})
    comparison = Comparison(job.monitor, counts, arms, list(range(seeds)), len(score), notes)
    job.compared_lr = saved["lr"]
    trials.end(asdict(comparison), saved)
    return comparison


def _counts(label_counts: Sequence[int] | None, rows: int, recurring: int) -> list[int]:
    """Numbers of labels to compare at; a request for all rows means all that are left without the recurring ones."""
    if not label_counts:
        return [rows]
    return sorted({rows if rows < n <= rows + recurring else int(n) for n in label_counts})


def _arm(
    job: Job, arm: str, subsets: Sequence[Table], choose: Table, score: Table, trials: ScoreFile
) -> tuple[dict[str, float], list[float], float]:
    """The learning rates with the best mean on ``choose``, their scores on ``score``, one per seed, and the seconds."""
    lrs, task = job.settings.optim.lrs, job.build(seed=0)
    out = Path(job.settings.train.out)
    fixed = job.fixed_lr(task, out) if arm == PRETRAINED else None
    if fixed is not None:
        lrs = [fixed]  # the reported arm is trained like the saved model
    elif not lrs:
        middle = job.lr(task)
        lrs = [float(f"{middle * f:.2g}") for f in _FACTORS]
    limit, _ = job.steps(len(subsets[0]))
    rates = {lr: job.rates(task, lr, None if fixed is None else out) for lr in lrs}
    scores_of: dict[float, list[list[float]]] = {}
    taken = 0.0
    for lr, used in rates.items():
        for seed, rows in enumerate(subsets):
            score_it = partial(job.score, rows, choose, score, rates=used, limit=limit, seed=seed)
            words = f"lr {lr!r}{rate_of_muon(used)}"
            name = f"{arm} at {len(rows)} labels, {limit}, {words}, seed {seed}"
            scores, seconds = trials.trial(name, partial(score_it, scratch=arm == SCRATCH))
            scores_of.setdefault(lr, []).append(scores)
            taken += seconds

    def mean(lr: float) -> float:
        chosen_by = [pair[0] for pair in scores_of[lr]]
        return float(np.mean(chosen_by)) if np.isfinite(chosen_by).all() else -math.inf

    best = max(lrs, key=mean)
    return rates[best], [pair[1] for pair in scores_of[best]], taken


def _baselines(job: Job) -> dict[str, Callable[..., dict[str, Any]]]:
    """TF-IDF, LSA and a probe of the checkpoint's own embeddings, or pixels; empty if they do not apply."""
    labels = job.data.train.columns.get("label", ())
    if (
        job.task.baseline is None
        or job.monitor not in ("accuracy", "macro_f1", "miou", "pearson")
        or any(isinstance(value, list | tuple) for value in labels[:50])
    ):
        return {}
    if (features := job.task.baseline) in baseline.VECTORS:
        if importlib.util.find_spec("sklearn") is None:
            note("no classical baseline: scikit-learn is not installed")
            return {}
        name = "mel" if features == "log-mel" else features
        return {name: partial(baseline.vector_baseline, features)}
    try:
        # Pre-training may have used the text of the task, so one classical model is fitted on all of it, too.
        space = baseline.Lsa(job.task.baseline_columns(job.data.train)[0])
    except (ConfigError, DataError) as error:
        note(f"no classical baseline: {error}")
        return {}
    embed, vectors = baseline.embeddings(job.build(seed=0).model), dict[str, Any]()

    def embedded(texts: Sequence[str]) -> Any:
        """A vector for each text; texts that several seeds share are embedded once."""
        new = list(dict.fromkeys(text for text in texts if text not in vectors))
        if new:
            with muted():  # the run says which texts are cut
                vectors.update(zip(new, embed(new), strict=True))
        return np.stack([vectors[text] for text in texts])

    return {
        "tfidf": baseline.tfidf_baseline,
        "lsa": partial(baseline.lsa_baseline, space),
        "probe": partial(baseline.probe_baseline, embedded),
    }


def _pretraining(job: Job) -> tuple[int, float]:
    """Tokens and seconds of pre-training, from the log of the checkpoint's run; 0 if not known."""
    tokens, seconds = 0, 0.0
    if isinstance(job.source, str):
        run = Path(job.source)
        with contextlib.suppress(OSError, DataError):
            for record in read_history(run if (run / "log.jsonl").is_file() else run.parent).train:
                tokens = int(record.get("tokens", tokens))
                seconds = float(record.get("seconds", seconds))
    return tokens, seconds


class Gain(NamedTuple):
    """Pre-trained minus scratch, paired over seeds; above 0 is better for every metric."""

    mean: float
    low: float
    high: float
    positive: int
    """Number of seeds with a gain above 0."""


@dataclass
class Notes:
    """Context of the scores in the report.

    Args:
        data: name of the data set.
        dropped: number of training rows left out because their normalised text recurs in the scored rows.
        scored_on: name of the scored rows: ``test``, or ``held-out`` if there are no test rows.
        valid_rows: number of rows on which every arm was tuned.
        settings: hyperparameters chosen per arm, as ``{"scratch": {"lr": 1e-3}, "tfidf": {"C": 10.0}}``; a list is
            one value per seed.
        seconds: seconds of fine-tuning per arm, and of ``"pre-training"``.
        tokens: tokens of pre-training, or what else ``unit`` names.
        unit: what the model counts, in the plural.
        saved: hyperparameters of the saved model, in the terms of ``settings``.
    """

    data: str = ""
    dropped: int = 0
    scored_on: str = "test"
    valid_rows: int = 0
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    unit: str = _TOKENS
    saved: str = ""


@dataclass(repr=False)
class Comparison:
    """Scores of all arms at a few label counts, with statistics, verdicts and report.

    Args:
        metric: name of the score. Scores of ``training.validation.LOWER_IS_BETTER`` are reported as they are, all
            others are in [0, 1] or a correlation and are reported in points, 100 times the score.
        counts: numbers of labels, ascending.
        arms: arm -> label count -> one test score per seed. ``"pretrained"`` and ``"scratch"`` are required, with
            every count; every other arm is a baseline.
        seeds: seeds of fine-tuning, in the order of the scores.
        test_rows: number of rows behind every score, used once.
        notes: context of the scores in the report.

    Raises:
        DataError: an arm, a count or a score is missing.
    """

    metric: str
    counts: list[int]
    arms: dict[str, dict[int, list[float]]]
    seeds: list[int]
    test_rows: int
    notes: Notes = field(default_factory=Notes)

    def __post_init__(self) -> None:
        for needed in (PRETRAINED, SCRATCH):
            if needed not in self.arms:
                raise DataError(
                    f"A comparison needs the arms {PRETRAINED!r} and {SCRATCH!r}; here are "
                    f"{', '.join(map(repr, self.arms)) or 'none'}."
                )
        if not self.counts or not self.seeds:
            raise DataError("A comparison needs at least one number of labels and one seed.")
        self.counts = sorted(self.counts)
        self.arms = {n: self.arms[n] for n in (*_SHORT, *self.arms) if n in self.arms}
        for name, scores in self.arms.items():
            for count in self.counts if name in (PRETRAINED, SCRATCH) else scores:
                num_scores = len(scores.get(count, ()))
                if num_scores != len(self.seeds):
                    raise DataError(
                        f"Arm {name!r} has {num_scores} scores at {count} labels but there are {len(self.seeds)} "
                        f"seeds; every arm needs one score per seed (nan for a run that failed)."
                    )

    @property
    def baselines(self) -> list[str]:
        """The arms that are neither pre-trained nor from scratch."""
        return [name for name in self.arms if name not in (PRETRAINED, SCRATCH)]

    # Statistics and verdicts

    def gain(self, count: int) -> Gain:
        """The paired gain at a number of labels with its 95 % t interval, in points (or units of the metric)."""
        differences = self._differences(PRETRAINED, SCRATCH, count)
        mean, low, high = mean_interval(differences)
        if math.isfinite(low):
            half = self._half(differences, len(differences))
            low, high = mean - half, mean + half
        return Gain(mean, low, high, sum(value > 0 for value in differences))

    def best_baseline(self, count: int) -> tuple[str, float] | None:
        """The baseline with the best mean, and its lead over the pre-trained mean; None without baselines."""
        leads = {
            name: statistics.fmean(self._differences(name, PRETRAINED, count))
            for name in self.baselines
            if count in self.arms[name]
        }
        known = {name: lead for name, lead in leads.items() if not math.isnan(lead)}
        name = max(known, key=known.__getitem__, default=None)
        return None if name is None else (name, known[name])

    def outcome(self, count: int) -> str:
        """``"helps"``, ``"hurts"``, ``"no difference"`` or ``"unknown"`` (one seed, or a score is missing).

        ``"helps"`` needs an interval above 0 and a gain in four of five seeds; ``"hurts"`` is the mirror image.
        """
        gain, seeds = self.gain(count), len(self.seeds)
        if math.isnan(gain.low):
            return "unknown"
        negative = sum(value < 0 for value in self._differences(PRETRAINED, SCRATCH, count))
        if gain.low > 0 and 5 * gain.positive >= 4 * seeds:
            return "helps"
        return "hurts" if gain.high < 0 and 5 * negative >= 4 * seeds else "no difference"

    def verdict(self, count: int) -> str:
        """Verdict for a number of labels, in one sentence; it names a better baseline, whatever the gain."""
        gain, outcome, best = self.gain(count), self.outcome(count), self.best_baseline(count)
        half = (gain.high - gain.low) / 2
        size = f"{self._plain(abs(gain.mean))} ± {self._plain(half)}{self._unit}"
        worse, other = best is not None and best[1] > 0, ""
        if best is not None:
            other = f"{self._long(best[0])} is better by {self._plain(best[1])}{self._unit}"
        if outcome == "unknown" and len(self.seeds) < 2:
            text = "no verdict: one seed has no interval, run at least two and better five"
        elif outcome == "unknown":
            text = "no verdict: a score is missing"
        elif outcome == "helps" and worse:
            return f"pre-training helps against scratch by {size}, but {other}"
        elif outcome == "helps":
            above = f", {self._plain(-best[1])} above {self._long(best[0])}" if best else ""
            return f"pre-training helps by {size}{above}"
        elif outcome == "hurts":
            more = _TEXT_HINTS if self.notes.unit == _TOKENS else ""
            text = f"pre-training hurts here by {size}; {_HINTS}{more}"
        else:
            text = self._open_verdict(count, gain)
        return f"{text}; and {other}" if worse else text

    def seeds_needed(self, count: int) -> int | None:
        """The fewest seeds at which this gain, with this spread over the seeds, has an interval that excludes 0.

        None if it takes more than `_MOST_SEEDS`, or a score is missing.
        """
        values = self._differences(PRETRAINED, SCRATCH, count)
        if len(values) < 2 or not all(map(math.isfinite, values)):
            return None
        mean, counts = abs(statistics.fmean(values)), range(2, _MOST_SEEDS + 1)
        return next((n for n in counts if mean > self._half(values, n)), None)

    def _half(self, values: Sequence[float], seeds: int) -> float:
        """Half of the interval of a mean over so many seeds with the spread of these values.

        Scores on few rows are often equal by chance, for they move in steps of a row: equal values have the spread of
        differences of scores that are rounded to rows.
        """
        spread = statistics.stdev(values)
        if spread < _EQUAL and self.metric not in LOWER_IS_BETTER:
            spread = self._scale / math.sqrt(6) / max(1, self.test_rows)
        return student_t(0.975, seeds - 1) * spread / math.sqrt(seeds)

    def _open_verdict(self, count: int, gain: Gain) -> str:
        """Verdict for an inconclusive result: no difference is seen, or there are too few seeds to see one.

        With few seeds the interval is too wide to rule a difference out.
        """
        seeds, needed = len(self.seeds), self.seeds_needed(count)
        facts = (
            f"{self._signed(gain.mean)}{self._unit}, 95 % interval {self._signed(gain.low)} to "
            f"{self._signed(gain.high)}, {gain.positive} of {seeds} seeds better"
        )
        if needed is not None and seeds < needed <= _WORTH_TRYING * seeds:
            return f"{seeds} seeds cannot tell ({facts}): if the gain is real, about {needed} seeds would show it"
        if seeds < _FEW_SEEDS:
            return f"{seeds} seeds cannot tell ({facts}): run at least 5"
        return f"no difference seen ({facts})"

    # Report

    def table(self) -> str:
        """The whole report as plain text: scores, gain per seed, chosen hyperparameters, cost and verdicts."""
        lines = [self._title(), "", *aligned(self._cells(), between=" | ")]
        lines += ["", *self._remarks(), ""]
        return "\n".join([*lines, *self._verdicts()])

    __str__ = table

    def svg(self, width: int = 720, height: int = 320) -> str:
        """Score against number of labels, one line per arm; whiskers are ± one standard deviation over the seeds."""
        series = []
        for name, scores in self.arms.items():
            points, bars = [], []
            for count in (c for c in self.counts if c in scores):
                mean, spread = _mean_sd([self._scale * score for score in scores[count]])
                points.append((float(count), mean))
                bars.append((float(count), mean - spread, mean + spread))
            series.append(Series(_SHORT.get(name, name), points, dots=True, whiskers=bars))
        title = f"{self.metric} on {self.notes.data}" if self.notes.data else self.metric
        title = title if len(title) <= 40 else title[:39] + "…"
        return curve_svg(
            series,
            title=title,
            x_label="labels",
            y_label=self._title_unit,
            log_x=True,
            width=width,
            height=height,
        )

    def __repr__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        head, *rows = self._cells()
        return notebook_view(
            "comparison",
            f"<p>{escape(self._title())}</p>",
            *(f"<p><b>{escape(verdict)}</b></p>" for verdict in self._verdicts()),
            table(head, rows, left=0),
            self.svg(),
            bullets(self._remarks()),
        )

    def to_json(self) -> str:
        """Everything as strict JSON (a score that is not finite becomes null); ``from_json`` reads it."""
        return json.dumps(without_nan(asdict(self)), allow_nan=False, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | Mapping[str, Any]) -> Comparison:
        """Read the output of ``to_json``, or the mapping that it spells.

        Raises:
            DataError: the text is not a saved comparison.
        """
        try:
            raw: Any = text
            if isinstance(text, str):
                raw = parse_json(text.encode("utf-8"), "the comparison")
            arms = {
                str(name): {int(n): list(map(_number, column)) for n, column in scores.items()}
                for name, scores in raw["arms"].items()
            }
            # Earlier versions wrote two more entries.
            context = {k: v for k, v in raw["notes"].items() if k not in ("stratified", "steps")}
            notes = Notes(**context)
            counts, seeds = ([int(n) for n in raw[key]] for key in ("counts", "seeds"))
            if not isinstance(raw["metric"], str):
                raise TypeError("the metric is not text")
            comparison = cls(raw["metric"], counts, arms, seeds, int(raw["test_rows"]), notes)
            comparison.table()  # content that cannot be shown raises here and not in a notebook
            return comparison
        except (LookupError, TypeError, ValueError, AttributeError, PretrainError) as error:
            raise DataError(
                f"This is not a saved comparison ({type(error).__name__}: {error}). Give the text that "
                f"Comparison.to_json wrote, unchanged."
            ) from None

    # Helpers

    @property
    def _scale(self) -> float:
        return 1.0 if self.metric in LOWER_IS_BETTER else 100.0

    @property
    def _unit(self) -> str:
        return f" ({self.metric})" if self.metric in LOWER_IS_BETTER else " points"

    def _plain(self, value: float) -> str:
        return f"{value:.4g}" if self.metric in LOWER_IS_BETTER else f"{value:.1f}"

    def _signed(self, value: float) -> str:
        return "–" if math.isnan(value) else f"{'+' if value > 0 else ''}{self._plain(value)}"

    def _long(self, name: str) -> str:
        linear = f"{_SHORT.get(name)} + {baseline.linear_model(self.metric)}"
        return linear if name in _LINEAR else name

    def _differences(self, one: str, other: str, count: int) -> list[float]:
        if count not in self.counts:
            raise DataError(f"There are no scores at {count} labels, only at {self.counts}.")
        sign = -1.0 if self.metric in LOWER_IS_BETTER else self._scale
        pairs = zip(self.arms[one][count], self.arms[other][count], strict=True)
        return [sign * (a - b) for a, b in pairs]

    @property
    def _title_unit(self) -> str:
        return self.metric if self.metric in LOWER_IS_BETTER else f"{self.metric} in %"

    def _verdicts(self) -> list[str]:
        return [f"{count:,} labels: {self.verdict(count)}" for count in self.counts]

    def _title(self) -> str:
        notes = self.notes
        tuned = f", tuned on {notes.valid_rows:,} validation rows" if notes.valid_rows else ""
        return (
            f"{notes.data or 'this data'}: {self._title_unit}, stratified subsets, {len(self.seeds)} paired seeds, "
            f"{self.test_rows:,} {notes.scored_on} rows touched once{tuned}; dropped {notes.dropped:,} training rows "
            f"that recur in the {notes.scored_on} rows"
        )

    def _cells(self) -> list[list[str]]:
        both, others = (SCRATCH, PRETRAINED), self.baselines
        titles = [f"{_SHORT[n]} + linear" if n in _LINEAR else n for n in others]
        rows = [["labels", *(_SHORT[n] for n in both), "gain [95 %]", "seeds better", *titles]]
        for count in self.counts:
            gain = self.gain(count)
            mean, low, high = map(self._signed, gain[:3])
            scores = [self._cell(name, count) for name in (*both, *others)]
            middle = [f"{mean} [{low}, {high}]", f"{gain.positive}/{len(self.seeds)}"]
            rows.append([f"{count:,}", *scores[:2], *middle, *scores[2:]])
        return rows

    def _cell(self, name: str, count: int) -> str:
        mean, spread = _mean_sd([self._scale * score for score in self.arms[name].get(count, [])])
        return "–" if math.isnan(mean) else f"{self._plain(mean)} ± {self._plain(spread)}"

    def _remarks(self) -> list[str]:
        notes, lines = self.notes, []
        for count in self.counts:
            each = " ".join(map(self._signed, self._differences(PRETRAINED, SCRATCH, count)))
            lines.append(f"gain per seed at {count:,} labels: {each}")
        chosen = [
            f"{_SHORT.get(name, name)} "
            + ", ".join(f"{k} {_value(v)}" for k, v in settings.items())
            for name, settings in notes.settings.items()
        ]
        if chosen:
            lines.append("chosen on validation: " + " | ".join(chosen))
        if notes.saved:
            lines.append(f"the saved model: {notes.saved}")
        cost = [f"{_SHORT.get(name, name)} {value:,.0f} s" for name, value in notes.seconds.items()]
        cost += [f"{notes.tokens:,} {notes.unit} of pre-training"] if notes.tokens else []
        return [*lines, "cost: " + " | ".join(cost)] if cost else lines


def _mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation; nan if there are no values or one is not finite, deviation 0 for one value."""
    if not values or not all(map(math.isfinite, values)):
        return math.nan, math.nan
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        parts = [_value(one) for one in value]
        return parts[0] if len(set(parts)) == 1 else " ".join(parts)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
