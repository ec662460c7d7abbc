"""The other arm: subsets in the shares of the classes, and a comparison from end to end."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pretrain
from finetuning.conftest import QUICK, rows_of
from pretrain.cli.main import main
from pretrain.data.labelled import Role
from pretrain.data.tables import Table
from pretrain.errors import ConfigError, DataError
from pretrain.finetuning.compare import _baselines, stratified_subset
from pretrain.finetuning.job import Job
from pretrain.finetuning.keywords import from_keywords
from pretrain.objectives.classification import Classification, encode_texts
from pretrain.training.state import Run


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=80), st.data(), st.integers(0, 99))
def test_subsets_hold_every_class_in_its_share(keys: list[int], data: Any, seed: int) -> None:
    count = data.draw(st.integers(0, len(keys)))
    chosen = stratified_subset(keys, count, seed)
    assert len(chosen) == len(set(chosen)) == count and chosen == sorted(chosen)
    assert chosen == stratified_subset(keys, count, seed)
    whole, part = Counter(keys), Counter(keys[i] for i in chosen)
    for key, n in whole.items():
        assert abs(part[key] - count * n / len(keys)) < 1


def test_seeds_choose_other_rows() -> None:
    keys = [i % 3 for i in range(90)]
    assert len({tuple(stratified_subset(keys, 12, seed)) for seed in range(6)}) == 6


def test_more_rows_than_there_are() -> None:
    with pytest.raises(DataError, match="3 training rows"):
        stratified_subset([1, 2], 3, 0)


def compared(checkpoint: str, out: Path, rows: Any = None, **given: Any) -> Any:
    options = {
        **QUICK,
        "lrs": [1e-2],
        "limit": "3 steps",
        "seeds": 2,
        "compare": "scratch",
        "out": out,
    }
    return pretrain.finetune(checkpoint, rows or rows_of(60), "classification", **(options | given))


@pytest.mark.parametrize("tested", [True, False])
def test_both_arms_and_the_baselines(checkpoint: str, tmp_path: Path, tested: bool) -> None:
    more = {"test": rows_of(20, 7)} if tested else {}
    result = compared(checkpoint, tmp_path / "run", label_counts=[12, 30], **more)
    found = result.comparison
    assert found.metric == "accuracy" and list(found.counts) == [12, 30]
    assert set(found.arms) == {"pretrained", "scratch", "tfidf", "lsa", "probe"}
    for by_count in found.arms.values():
        assert all(
            len(scores) == 2 and all(0 <= x <= 1 for x in scores) for scores in by_count.values()
        )
    assert found.test_rows == (20 if tested else 7)
    table = found.table()
    assert "from scratch" in table and "TF-IDF" in table
    assert not [*tmp_path.glob("*.trial"), *tmp_path.glob("run/.pretrain-*")]
    assert result.metrics and result.run.step == 3


def test_the_embeddings_of_the_probe_say_nothing_of_texts_that_are_cut(
    checkpoint: str, tmp_path: Path, capfd: Any
) -> None:
    """The run says what it cuts, and the line would not say of what it speaks."""
    given = {"train": rows_of(24), "out": str(tmp_path / "run"), "device": "cpu"}
    job = Job.open(checkpoint, *from_keywords(None, checkpoint, "classification", given))
    job.build(seed=0)
    capfd.readouterr()
    embedded = _baselines(job)["probe"].args[0]
    assert len(embedded(["the cat " * 200, "the dog", "the dog"])) == 3
    assert "cut" not in capfd.readouterr().err


class Titled(Classification):
    """Classify by a title and a year."""

    name = "titled"
    roles = (Role("title", ("title",)), Role("year", ("year",), False), Classification.roles[-1])

    def encode_inputs(self, table: Table, *, targets: bool) -> Any:
        """Read both as one text."""
        rows = zip(*(table.columns[role.name] for role in self.roles[:-1]), strict=True)
        text = [" ".join(map(str, row)) for row in rows]
        return encode_texts(self, table.with_columns({**table.columns, "text": text}, {}))


class Dated(Titled):
    """Classify by numbers alone."""

    name = "dated"
    roles = (Titled.roles[1], Classification.roles[-1])


@pytest.mark.parametrize(
    ("task", "others"), [("Titled", {"tfidf", "lsa", "probe"}), ("Dated", set())]
)
def test_baselines_of_a_task_of_ones_own_read_its_columns_of_text(
    checkpoint: str, tmp_path: Path, task: str, others: set[str], capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"title": row["text"], "year": 1990 + i, "label": row["label"]}
        for i, row in enumerate(rows_of(40))
    ]
    given = {**QUICK, "limit": "2 steps", "compare": "scratch", "seeds": 2, "quiet": False}
    out = tmp_path / "run"
    result = pretrain.finetune(checkpoint, rows, f"{__name__}:{task}", out=out, **given)
    assert set(result.comparison.arms) == {"pretrained", "scratch", *others}
    line = "no classical baseline: a list of 40 rows has no column of text among those that the task dated"
    assert (line in capfd.readouterr().err) == (not others)
    assert (result.classical is None) == (not others)


def test_scores_are_those_of_the_trial(checkpoint: str, tmp_path: Path) -> None:
    """Another comparison gives the same figures."""
    first = compared(checkpoint, tmp_path / "a").comparison
    again = compared(checkpoint, tmp_path / "b").comparison
    assert first.arms == again.arms


def test_a_comparison_that_was_interrupted_goes_on_and_is_kept(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupted one lost all its arms, and a page that was made again had no verdict."""
    rows, out = tmp_path / "rows.jsonl", tmp_path / "run"
    rows.write_text("".join(json.dumps(row) + "\n" for row in rows_of(40)))
    trained: list[tuple[bool, int]] = []

    def score(
        job: Job, *parts: Any, rates: Any, limit: str, seed: int, scratch: bool
    ) -> list[float]:
        if len(trained) == 3:
            trained.append((scratch, -1))
            raise KeyboardInterrupt
        trained.append((scratch, seed))
        return [0.5, 0.25 + seed / 8 if scratch else math.nan]

    monkeypatch.setattr(Job, "score", score)
    monkeypatch.setattr("pretrain.finetuning.compare._baselines", lambda *_: {})
    with pytest.raises(KeyboardInterrupt, match=r"comparison\.json keeps the scores of .*\(3\)"):
        compared(checkpoint, out, str(rows))
    assert [path.name for path in out.iterdir()] == ["comparison.json"]
    found = compared(checkpoint, out, str(rows)).comparison
    assert trained == [(False, 0), (False, 1), (True, 0), (True, -1), (True, 1)]
    assert found.arms["scratch"] == {30: [0.25, 0.375]} and math.isnan(
        found.arms["pretrained"][30][1]
    )
    # More seeds are trained beside those that are kept.
    more = compared(checkpoint, out, str(rows), seeds=3).comparison
    assert trained[5:] == [(False, 2), (True, 2)] and more.seeds == [0, 1, 2]
    # The page and a call without a comparison show it, as long as it is of the run.
    (out / "report.html").unlink()
    assert main(["report", str(out)]) == 0
    assert "Did pre-training help?" in (out / "report.html").read_text("utf-8")
    assert compared(checkpoint, out, str(rows), compare=None).comparison.table() == more.table()
    text = (out / "comparison.json").read_text("utf-8")
    (out / "comparison.json").write_text(text.replace("0.375", "0.875"), "utf-8")
    assert compared(checkpoint, out, str(rows), compare=None).comparison is None
    assert len(trained) == 7


@pytest.mark.parametrize("given", [{"lr": 2e-2}, {"weight_decay": 0.5}, {"valid": 0.5}])
def test_trials_of_other_settings_are_not_used(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]
) -> None:
    trained: list[int] = []

    def score(*_: Any, seed: int, **given: Any) -> list[float]:
        trained.append(seed)
        if len(trained) == 4:
            raise KeyboardInterrupt
        return [0.5, 0.5]

    monkeypatch.setattr(Job, "score", score)
    monkeypatch.setattr("pretrain.finetuning.compare._baselines", lambda *_: {})
    for more in ({}, given):
        trained.clear()
        with pytest.raises(KeyboardInterrupt):
            compared(checkpoint, tmp_path / "run", **more)
    assert trained == [0, 1, 0, 1]


def test_comparisons_that_cannot_be(checkpoint: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="500 training rows"):
        compared(checkpoint, tmp_path / "b", label_counts=[500])
    with pytest.raises(DataError, match="held-out"):
        compared(checkpoint, tmp_path / "c", valid=0)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"compare": "nothing"}, r"compare='scratch'"),
        ({"seeds": 1}, r"seeds is 1;.*seeds=5"),
        ({"seeds": 2.5}, r"seeds is 2\.5;"),
        ({"label_counts": [0]}, r"label_counts is \[0\];.*label_counts=\[50, 200\]"),
        ({"label_counts": [20, -5]}, "label_counts"),
        ({"label_counts": 50}, "label_counts is 50;"),
        ({"label_counts": ["10"]}, "label_counts"),
        ({"label_counts": "10"}, "label_counts"),
        ({"limit": "0.1 minutes"}, r"number of steps.*limit='500 steps'"),
        ({"limit": "2 hours"}, "limit is '2 hours'"),
    ],
)
def test_what_no_comparison_can_be_made_with_is_refused_before_the_rows_are_read(
    tmp_path: Path, given: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        compared("no-model", tmp_path / "a", str(tmp_path / "no-rows.csv"), **given)


def test_asking_for_all_rows_allows_for_those_that_recur():
    from pretrain.finetuning.compare import _counts

    assert _counts(None, 511, 1) == [511]
    assert _counts([128, 512], 511, 1) == [128, 511]
    assert _counts([513, 128], 511, 1) == [128, 513]  # refused later: there are not so many


@pytest.mark.slow
def test_the_model_that_is_saved_has_the_rate_that_was_compared(
    checkpoint: str, tmp_path: Path
) -> None:
    """A rate that learns nothing and one that learns: the run, its card and the comparison agree on the second."""
    options = {"lr": "auto", "lrs": [1e-9, 2e-2], "limit": "30 steps", "test": rows_of(20, 7)}
    result = compared(checkpoint, tmp_path / "run", rows_of(90), **options)
    rate, count = max(r["lr"] for r in result.run.history if "lr" in r), result.counts["train"]
    chosen = f"lr at {count}"
    assert result.comparison.notes.settings["pretrained"][chosen] == 2e-2
    assert rate == pytest.approx(2e-2, rel=0.2)
    assert f"lr 0.02 on all {count} rows" in result.comparison.table()
    assert "learning rate is 0.02" in (result.save(tmp_path / "saved") / "README.md").read_text()
    # The run goes on with its rate, with and without a comparison, which then compares no other.
    alone = compared(checkpoint, tmp_path / "run", rows_of(90), **options, compare=None)
    assert alone.run.metrics == result.run.metrics
    again = compared(checkpoint, tmp_path / "run", rows_of(90), **options)
    assert again.comparison.notes.settings["pretrained"][chosen] == 2e-2
    # A rate that the user names is the one that is compared.
    named = compared(
        checkpoint, tmp_path / "named", rows_of(90), **(options | {"lr": 1e-3, "limit": "3 steps"})
    )
    assert named.comparison.notes.settings["pretrained"][chosen] == 1e-3


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_a_sweep_that_is_stopped_exits_as_every_command(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in rows_of(30)))

    def fit(self: Any, *hooks: Any) -> Run:
        return Run(self.out, 1, name, {}, [])

    monkeypatch.setattr("pretrain.training.trainer.Trainer.fit", fit)
    words = ["finetune", "--model", checkpoint, "--data", str(rows), "--task", "classification"]
    options = [
        "--optim.lr",
        "sweep",
        "--train.out",
        str(tmp_path / "run"),
        "--parallel.device",
        "cpu",
    ]
    assert main([*words, *options]) == code
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]
