"""Comparison with training from scratch, on the same rows, budget and seeds, and with classical baselines.

Each arm is tuned separately: all of its learning rates are run with all seeds, the one with the best mean on the
held-out rows is chosen, and its scores on the test rows are compared seed by seed. Without test rows the held-out
rows are halved, one half for the choice and one for the scores. Both arms have the same number of optimizer steps. The
saved model is trained at the learning rate chosen for the pre-trained arm; if that rate is already fixed, by the user
or because the run has begun, the arm is trained only at this rate.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pretrain.errors import ConfigError, DataError
from pretrain.finetuning.remarks import texts_of
from pretrain.finetuning.transfer import Comparison, Notes
from pretrain.metrics import LOWER_IS_BETTER
from pretrain.report.history import read_history
from pretrain.utils.files import note

if TYPE_CHECKING:
    from pretrain.data.tables import Table
    from pretrain.finetuning.job import Job

__all__ = ["compare_arms", "stratified_subset"]

_FACTORS = (1.0, 3.0)  # factors on the automatic learning rate, the same for both arms


def stratified_subset(keys: Sequence[Hashable] | None, count: int, seed: int) -> list[int]:
    """Choose ``count`` rows with every class in its share, as nearly as whole rows allow.

    Args:
        keys: class of each row; None is an error, as the number of rows is then not known.
        count: number of rows to choose.
        seed: seed of the choice among the rows of a class.

    Raises:
        DataError: there are fewer rows.
    """
    if keys is None or count > len(keys):
        have = 0 if keys is None else len(keys)
        raise DataError(f"{count:,} training rows were asked for, and there are {have:,}.")
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


def compare_arms(job: Job, label_counts: Sequence[int] | None, seeds: int) -> Comparison:
    """Train both arms and the baselines at every number of labels, and set the chosen learning rate in the job.

    Args:
        job: job of the main run.
        label_counts: numbers of training rows; all of them when None.
        seeds: number of paired seeds of each arm.

    Raises:
        ConfigError: fewer than two seeds.
        DataError: too few held-out rows, or a label count above the number of rows.
    """
    if seeds < 2:
        raise ConfigError(f"seeds is {seeds}; an interval over seeds needs at least 2.")
    train, choose, score = job.data.train, job.data.valid, job.data.test
    if score is None:
        if len(choose) < 4:
            raise DataError("A comparison needs held-out rows to choose and to score by.")
        score = choose.take(range(1, len(choose), 2))
        choose = choose.take(range(0, len(choose), 2))
    counts = _counts(label_counts, len(train), job.data.left_out)
    strata = job.task.learn(train, job.settings.task.options).strata or [0] * len(train)
    arms: dict[str, dict[int, list[float]]] = {}
    part = "valid" if job.data.test is None else "test"
    notes = Notes(
        data=job.data.names["train"],
        dropped=job.data.recurring.get(part, 0),
        scored_on="held-out" if job.data.test is None else "test",
        valid_rows=len(choose),
    )
    notes.tokens, notes.seconds["pre-training"] = _pretraining(job)
    baselines = _Baselines.of(job)
    for count in counts:
        subsets = [train.take(stratified_subset(strata, count, seed)) for seed in range(seeds)]
        for arm in ("pretrained", "scratch"):
            began = time.monotonic()
            lr, scores = _arm(job, arm, subsets, choose, score)
            arms.setdefault(arm, {})[count] = scores
            notes.settings.setdefault(arm, {})[f"lr at {count}"] = lr
            if (
                arm == "pretrained"
            ):  # the last count is the largest: the saved model is trained on all rows
                job.compared_lr = lr
            notes.seconds[arm] = notes.seconds.get(arm, 0.0) + time.monotonic() - began
            if not job.quiet:
                shown = " ".join(f"{abs(x):.3f}" for x in scores)
                note(f"{arm} at {count:,} labels: {shown} (lr {lr:g})")
        for name, found in (baselines.scores(subsets, choose, score) if baselines else {}).items():
            arms.setdefault(name, {})[count] = [one["score_test"] for one in found]
            notes.settings.setdefault(name, {})[f"C at {count}"] = [one["C"] for one in found]
    notes.saved = f"lr {job.compared_lr:g} on all {len(train):,} rows"
    lower = job.monitor in LOWER_IS_BETTER
    for by_count in arms.values() if lower else ():
        by_count.update({n: [-x for x in scores] for n, scores in by_count.items()})
    return Comparison(
        job.monitor, counts, arms, seeds=list(range(seeds)), test_rows=len(score), notes=notes
    )


def _counts(asked: Sequence[int] | None, rows: int, recurring: int) -> list[int]:
    """Numbers of labels to compare at; a request for all rows means all that are left without the recurring ones."""
    if not asked:
        return [rows]
    return sorted({rows if rows < n <= rows + recurring else int(n) for n in asked})


def _arm(
    job: Job, arm: str, subsets: Sequence[Table], choose: Table, score: Table
) -> tuple[float, list[float]]:
    """The learning rate with the best mean on ``choose``, and its scores on ``score``, one per seed."""
    lrs, task = job.settings.optim.lrs, job.build(seed=0)
    settled = job.settled_lr(task, Path(job.settings.train.out))
    if arm == "pretrained" and settled is not None:
        lrs = [settled]  # the reported arm is trained like the saved model
    elif not lrs:
        middle = job.lr(task)
        lrs = [float(f"{middle * f:.2g}") for f in _FACTORS]
    limit, _ = job.steps(len(subsets[0]))
    found: dict[float, list[list[float]]] = {}
    for lr in lrs:
        found[lr] = [
            job.score(rows, choose, score, lr=lr, limit=limit, seed=seed, scratch=arm == "scratch")
            for seed, rows in enumerate(subsets)
        ]

    def mean(lr: float) -> float:
        chosen_by = [pair[0] for pair in found[lr]]
        return float(np.mean(chosen_by)) if np.isfinite(chosen_by).all() else -math.inf

    best = max(lrs, key=mean)
    return best, [pair[1] for pair in found[best]]


class _Baselines:
    """TF-IDF, LSA and the checkpoint's own embeddings under a linear model, tuned on the same rows."""

    def __init__(self, job: Job) -> None:
        from pretrain.finetuning.baseline import Lsa

        self.metric = job.monitor
        # Pre-training may have used the text of the task, so one classical model is fitted on all of it, too.
        self.lsa = Lsa(texts_of(job.data.train))
        self.model = job.build(seed=0).model
        self.vectors: dict[str, Any] = {}

    def embed(self, texts: Sequence[str]) -> Any:
        """A vector for each text; texts that several seeds share are embedded once."""
        from pretrain.finetuning.baseline import embeddings

        new = list(dict.fromkeys(text for text in texts if text not in self.vectors))
        if new:
            self.vectors.update(zip(new, embeddings(self.model)(new), strict=True))
        return np.stack([self.vectors[text] for text in texts])

    @classmethod
    def of(cls, job: Job) -> _Baselines | None:
        """The baselines, or None if they do not apply."""
        applies = job.task.name in ("classification", "regression")
        if not applies or job.monitor not in ("accuracy", "macro_f1", "pearson"):
            return None
        if any(isinstance(value, list | tuple) for value in job.data.train.columns["label"][:50]):
            return None
        try:
            return cls(job)
        except ConfigError as error:
            if not job.quiet:
                note(f"no classical baseline: {error}")
            return None

    def scores(
        self, subsets: Sequence[Table], choose: Table, score: Table
    ) -> dict[str, list[dict[str, Any]]]:
        """Results of each baseline, one for each subset."""
        from pretrain.finetuning.baseline import lsa_baseline, probe_baseline, tfidf_baseline

        held = (texts_of(choose), choose.columns["label"], texts_of(score), score.columns["label"])
        found: dict[str, list[dict[str, Any]]] = {"tfidf": [], "lsa": [], "probe": []}
        for seed, rows in enumerate(subsets):
            args: Any = (texts_of(rows), rows.columns["label"], *held)
            found["tfidf"].append(tfidf_baseline(*args, metric=self.metric, seed=seed))
            found["lsa"].append(lsa_baseline(self.lsa, *args, metric=self.metric, seed=seed))
            found["probe"].append(probe_baseline(self.embed, *args, metric=self.metric, seed=seed))
        return found


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
