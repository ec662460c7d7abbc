"""Statistics and report of the comparison between a pre-trained model and the same model trained from scratch.

Both arms share architecture, rows, label subsets, seeds and optimizer steps, so their scores are paired by seed, and
the gain is the mean of the paired differences with Student's t interval (Student, 1908). A verdict requires both the
interval and four of five seeds on one side of 0. Classical baselines at the same labels are reported beside the two
arms, because a gain over a badly trained model is worth nothing; the verdict names a baseline that is better.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any, NamedTuple

from pretrain.errors import DataError, PretrainError
from pretrain.finetuning.cost import steps_to_best
from pretrain.metrics import LOWER_IS_BETTER
from pretrain.printing import aligned
from pretrain.utils.curves import Series, curve_svg
from pretrain.utils.html import bullets, notebook_view, table
from pretrain.utils.intervals import mean_interval, student_t
from pretrain.utils.strict_json import parse_json

__all__ = ["PRETRAINED", "SCRATCH", "Arm", "Comparison", "Gain", "Notes", "steps_to_best"]

PRETRAINED, SCRATCH = "pretrained", "scratch"
_SHORT = {
    PRETRAINED: "pre-trained",
    SCRATCH: "from scratch",
    "tfidf": "TF-IDF",
    "lsa": "LSA",
    "probe": "frozen",
}
_FEW_SEEDS = 3  # with fewer, an interval of any realistic spread contains 0
_WORTH_TRYING = (
    4  # times the seeds: a gain that so many would show is not reported as no difference
)
_MOST_SEEDS = 100
_HINTS = (
    "try a lower learning rate, optim.layer_decay or optim.l2_sp, go on pre-training on this text "
    '(task="language-modelling") before fine-tuning, and look whether the tokenizer fits the text (tokens per word)'
)


class Gain(NamedTuple):
    """Pre-trained minus scratch, paired over seeds; above 0 is better for every metric."""

    mean: float
    low: float
    high: float
    positive: int
    """Number of seeds with a gain above 0."""


@dataclass
class Arm:
    """Test scores of one arm: label count -> one score per seed, in the order of the seeds."""

    name: str
    scores: dict[int, list[float]]


@dataclass
class Notes:
    """Context of the scores in the report.

    Args:
        data: name of the data set.
        stratified: whether every subset has the class proportions of the whole.
        dropped: number of training rows left out because their normalised text recurs in the scored rows.
        scored_on: name of the scored rows: ``test``, or ``held-out`` if there are no test rows.
        valid_rows: number of rows on which every arm was tuned.
        settings: hyperparameters chosen per arm, as ``{"scratch": {"lr": 1e-3}, "tfidf": {"C": 10.0}}``; a list is
            one value per seed.
        seconds: seconds of fine-tuning per arm, and of ``"pre-training"``.
        tokens: tokens of pre-training.
        steps: steps of the pre-trained model to scratch's best score as a share of scratch's own, without and with
            the steps of pre-training; see ``steps_to_best``.
        saved: hyperparameters of the saved model, in the terms of ``settings``.
    """

    data: str = ""
    stratified: bool = True
    dropped: int = 0
    scored_on: str = "test"
    valid_rows: int = 0
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    steps: tuple[float, float] | None = None
    saved: str = ""


@dataclass(repr=False)
class Comparison:
    """Scores of all arms at a few label counts, with statistics, verdicts and report.

    Args:
        metric: name of the score. Those of ``metrics.LOWER_IS_BETTER`` are reported as they are, all others are in
            [0, 1] or a correlation and are reported in points, 100 times the score.
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
        for name, scores in self.arms.items():
            for count in self.counts if name in (PRETRAINED, SCRATCH) else scores:
                found = len(scores.get(count, ()))
                if found != len(self.seeds):
                    raise DataError(
                        f"Arm {name!r} has {found} scores at {count} labels but there are {len(self.seeds)} seeds; "
                        f"every arm needs one score per seed (nan for a run that failed)."
                    )

    def arm(self, name: str) -> Arm:
        """One arm by its name."""
        return Arm(name, self.arms[name])

    @property
    def baselines(self) -> list[str]:
        """The arms that are neither pre-trained nor from scratch."""
        return [name for name in self.arms if name not in (PRETRAINED, SCRATCH)]

    # Statistics and verdicts

    def gain(self, count: int) -> Gain:
        """The paired gain at a number of labels with its 95 % t interval, in points (or units of the metric)."""
        differences = self._differences(PRETRAINED, SCRATCH, count)
        return Gain(*mean_interval(differences), sum(value > 0 for value in differences))

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
        size = (
            f"{self._plain(abs(gain.mean))} ± {self._plain((gain.high - gain.low) / 2)}{self._unit}"
        )
        worse = best is not None and best[1] > 0
        other = (
            f"{self._long(best[0])} is better by {self._plain(best[1])}{self._unit}"
            if best and worse
            else ""
        )
        if outcome == "unknown":
            text = "no verdict: " + (
                "one seed has no interval, run at least two and better five"
                if len(self.seeds) < 2
                else "a score is missing"
            )
        elif outcome == "helps" and worse:
            return f"pre-training helps against scratch by {size}, but {other}"
        elif outcome == "helps":
            above = f", {self._plain(-best[1])} above {self._long(best[0])}" if best else ""
            return f"pre-training helps by {size}{above}"
        elif outcome == "hurts":
            text = f"pre-training hurts here by {size}; {_HINTS}"
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
        mean, spread = abs(statistics.fmean(values)), statistics.stdev(values)
        return next(
            (
                n
                for n in range(2, _MOST_SEEDS + 1)
                if mean > student_t(0.975, n - 1) * spread / math.sqrt(n)
            ),
            None,
        )

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
        lines += [f"{count:,} labels: {self.verdict(count)}" for count in self.counts]
        return "\n".join(lines)

    __str__ = table

    def svg(self) -> str:
        """Score against number of labels, one line per arm; whiskers are ± one standard deviation over the seeds."""
        series = []
        for name, scores in self._ordered():
            points, bars = [], []
            for count in (c for c in self.counts if c in scores):
                mean, spread = _mean_sd([self._scale * score for score in scores[count]])
                points.append((float(count), mean))
                bars.append((float(count), mean - spread, mean + spread))
            series.append(Series(_SHORT.get(name, name), points, dots=True, whiskers=bars))
        where = f" on {self.notes.data}" if self.notes.data else ""
        unit = f"{self.metric} in %" if self._scale != 1 else self.metric
        title = f"{self.metric}{where}"
        short = title if len(title) <= 40 else title[:39] + "…"
        return curve_svg(series, title=short, x_label="labels", y_label=unit, log_x=True)

    def __repr__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        head, *rows = self._cells()
        verdicts = [f"{count:,} labels: {self.verdict(count)}" for count in self.counts]
        return notebook_view(
            "comparison",
            f"<p>{escape(self._title())}</p>",
            *(f"<p><b>{escape(verdict)}</b></p>" for verdict in verdicts),
            table(head, rows, left=0),
            self.svg(),
            bullets(self._remarks()),
        )

    def to_json(self) -> str:
        """Everything as strict JSON (a score that is not finite becomes null); ``from_json`` reads it."""
        return json.dumps(_without_nan(asdict(self)), allow_nan=False, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Comparison:
        """Read the output of ``to_json``.

        Raises:
            DataError: the text is not a saved comparison.
        """
        try:
            raw = parse_json(text.encode("utf-8"), "the comparison")
            arms = {
                str(name): {int(n): list(map(_number, column)) for n, column in scores.items()}
                for name, scores in raw["arms"].items()
            }
            notes = Notes(**raw["notes"])
            if notes.steps is not None:
                alone, whole = (math.inf if x is None else float(x) for x in notes.steps)
                notes.steps = (alone, whole)
            counts, seeds = ([int(n) for n in raw[key]] for key in ("counts", "seeds"))
            if not isinstance(raw["metric"], str):
                raise TypeError("the metric is no name")
            found = cls(raw["metric"], counts, arms, seeds, int(raw["test_rows"]), notes)
            found.table()  # content that cannot be shown raises here and not in a notebook
            return found
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
        linear = (
            "ridge regression" if self.metric in ("pearson", "spearman") else "logistic regression"
        )
        return f"{_SHORT[name]} + {linear}" if name in ("tfidf", "lsa", "probe") else name

    def _differences(self, one: str, other: str, count: int) -> list[float]:
        if count not in self.counts:
            raise DataError(f"There are no scores at {count} labels, only at {self.counts}.")
        sign = -1.0 if self.metric in LOWER_IS_BETTER else self._scale
        pairs = zip(self.arms[one][count], self.arms[other][count], strict=True)
        return [sign * (a - b) for a, b in pairs]

    def _ordered(self) -> list[tuple[str, dict[int, list[float]]]]:
        order = [PRETRAINED, SCRATCH, "tfidf", "lsa", "probe"]
        names = [n for n in order if n in self.arms] + [n for n in self.arms if n not in order]
        return [(name, self.arms[name]) for name in names]

    def _title(self) -> str:
        notes = self.notes
        unit = f"{self.metric} in %" if self._scale != 1 else self.metric
        return (
            f"{notes.data or 'this data'}: {unit}, {'stratified' if notes.stratified else 'random'} subsets, "
            f"{len(self.seeds)} paired seeds, {self.test_rows:,} {notes.scored_on} rows touched once"
            + (f", tuned on {notes.valid_rows:,} validation rows" if notes.valid_rows else "")
            + f"; dropped {notes.dropped:,} training rows that recur in the {notes.scored_on} rows"
        )

    def _cells(self) -> list[list[str]]:
        names = [SCRATCH, PRETRAINED]
        others = [name for name, _ in self._ordered() if name not in names]
        titles = [f"{_SHORT[n]} + linear" if n in ("tfidf", "lsa", "probe") else n for n in others]
        rows = [["labels", *(_SHORT[n] for n in names), "gain [95 %]", "seeds better", *titles]]
        for count in self.counts:
            gain = self.gain(count)
            interval = (
                f"{self._signed(gain.mean)} [{self._signed(gain.low)}, {self._signed(gain.high)}]"
            )
            rows.append([
                f"{count:,}",
                *(self._cell(name, count) for name in names),
                interval,
                f"{gain.positive}/{len(self.seeds)}",
                *(self._cell(name, count) for name in others),
            ])  # fmt: skip
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
        seconds = [
            f"{_SHORT.get(name, name)} {value:,.0f} s" for name, value in notes.seconds.items()
        ]
        tokens = [f"{notes.tokens:,} tokens of pre-training"] if notes.tokens else []
        if seconds or tokens:
            lines.append("cost: " + " | ".join(seconds + tokens))
        if notes.steps is not None:
            alone, whole = (
                f"{100 * share:,.0f} %" if math.isfinite(share) else "never"
                for share in notes.steps
            )
            lines.append(f"steps to scratch's best score: {alone} ({whole} with pre-training)")
        return lines


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


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _without_nan(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
