"""The benchmark suite: what counts as equal work, when a case is discarded, and every row once on tiny shapes."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import harness, report
from benchmarks.__main__ import ROWS, main
from benchmarks.harness import FP32, Case, Contender, Settings, Work, compare, unequal
from benchmarks.pretraining import DECODERS, Decoders

DATA = Path(os.environ.get("PRETRAIN_TEST_DATA", "/nowhere")) / "tiny_shakespeare"
TINY = Settings(torch.device("cpu"), tiny=True)


def contender(
    name: str, kind: str, cost: float, work: Work | None = None, needs: str = "torch"
) -> Contender:
    return Contender(name, kind, lambda: (lambda: cost, work or Work(10, (2.0, 1.0), 0.5)), needs)


def test_work_is_unequal_if_tokens_losses_updates_or_ids_differ() -> None:
    ours = Work(10, (2.0, 1.0), 0.5, {"ids": [1]})
    assert not unequal(ours, Work(10, (2.0001, 1.0005), 0.502, {"ids": [1]}), FP32)
    for other, word in (
        (Work(9, (2.0, 1.0), 0.5), "9 tokens where ours has 10"),
        (Work(10, (2.01, 1.0), 0.5), "first loss"),
        (Work(10, (2.0, 1.1), 0.5), "last loss"),
        (Work(10, (2.0, float("nan")), 0.5), "last loss"),
        (Work(10, (2.0, 1.0), 0.6), "update norm"),
        (Work(10, others={"ids": [2]}), "ids"),
    ):
        assert word in unequal(ours, other, FP32)


def test_a_peer_that_does_other_work_or_is_not_installed_has_no_ratio() -> None:
    case = Case(
        "case", "seconds",
        [
            contender("ours", "ours", 1.0),
            contender("slow", "best", 2.0),
            contender("cheat", "best", 0.1, Work(1)),
            contender("absent", "default", 1.0, needs="no_such_package"),
        ],
        {"best": 1.5},
    )  # fmt: skip
    record = compare(case, Settings(torch.device("cpu")), deadline=0.0)
    states = {entry["name"]: (entry["state"], entry["samples"]) for entry in record["contenders"]}
    assert states["slow"] == ("ok", [2.0] * 3) and states["cheat"] == ("failed", [])
    assert states["absent"] == ("missing", []) and record["control"] == [1.0] * 3
    assert report.summary([{"row": "x", **record}]) == [(2.0, "x", "case", "slow")]
    page = "\n".join(report.table(record))
    assert "2.00 (2.00 to 2.00) | 1.50, held" in page and "no_such_package is not installed" in page
    assert "1 tokens where ours has 10" in page


def test_a_case_is_measured_once_more_and_then_discarded_if_ours_differs_from_itself() -> None:
    costs = iter([1.0, 1.2] * 6)

    def unsteady() -> tuple[Any, Work]:
        return lambda: next(costs), Work(10)

    record = compare(
        Case("case", "seconds", [Contender("ours", "ours", unsteady)], rounds=(3, 3)),
        Settings(torch.device("cpu")), deadline=0.0,
    )  # fmt: skip
    # Every other round runs backwards, so that a drift cancels: here the first of the two is always the faster one.
    assert record["attempts"] == 2 and record["state"] == "discarded" and "1.200" in record["why"]
    assert "| peer |" not in "\n".join(report.table(record))


def test_the_script_trains_as_our_decoder_does_and_another_learning_rate_is_seen() -> None:
    d = Decoders(TINY, DECODERS["tiny"], "gpt2", mean=6)
    _, ours = d.ours()
    assert ours.losses[-1] < ours.losses[0]
    assert not unequal(ours, d.script("dense")[1], FP32)
    assert "loss" in unequal(ours, d.script()[1], FP32)  # it does not keep documents apart


def test_rows_run_and_the_page_is_made_of_their_ratios(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the peers, whose imports take long."""
    monkeypatch.setattr(harness, "installed", lambda name: name == "torch")
    assert main(["2", "parts", "--tiny", "--out", str(tmp_path / "bench.json")]) == 0
    found = json.loads((tmp_path / "bench.json").read_text())
    check(found)
    assert "A/A control" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    assert main(["report", "bench.json"]) == 0
    page = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert (
        "stock torch" in page
        and "transformers is not installed" in page
        and "The worst first" in page
    )
    assert not re.search(r"\d (s|ms|seconds)\b", page), "a time that stands alone"
    assert "stopped" not in page
    found["about"]["rows"].append("save")
    (tmp_path / "part.json").write_text(json.dumps(found))
    report.write_page([tmp_path / "part.json"], tmp_path)
    assert "stopped before the rows save" in (tmp_path / "benchmarks.md").read_text()
    assert (tmp_path / "figures" / "benchmarks.svg").read_text().startswith("<svg")


def test_a_page_takes_rows_from_a_later_run(tmp_path: Path):
    """Its rows replace those of the first run; another machine or version is refused."""
    about = {"cpu": "c", "device": "cpu", "versions": {"torch": "1"}, "started": "", "budget": 9}
    rows = [{"row": "prepare", "case": "old"}, {"row": "decoder", "case": "old"}]
    first, later = tmp_path / "first.json", tmp_path / "later.json"
    first.write_text(json.dumps({"about": about, "rows": rows}))
    later.write_text(json.dumps({"about": about, "rows": [{"row": "prepare", "case": "new"}]}))
    _, found, remarks = report.joined([first, later])
    assert [(one["row"], one["case"]) for one in found] == [("decoder", "old"), ("prepare", "new")]
    assert len(remarks) == 1 and "prepare" in remarks[0]
    later.write_text(json.dumps({"about": {**about, "versions": {"torch": "2"}}, "rows": []}))
    with pytest.raises(SystemExit, match="another versions"):
        report.joined([first, later])


def check(found: dict[str, Any]) -> None:
    """What a JSON file must say."""
    assert found["about"]["versions"]["torch"] and found["about"]["cpu"]
    for record in found["rows"]:
        assert record["state"] == "ok", record
        assert len(record["probe"]) == 2 and record["unit"] and record["probe"][0]["gflops"] > 0
        ours = [entry for entry in record["contenders"] if entry["kind"] == "ours"]
        assert len(ours) == 1 and ours[0]["samples"] and ours[0]["work"] is not None
        assert {entry["kind"] for entry in record["contenders"]} <= set(harness.KINDS)
        for entry in record["contenders"]:
            assert entry["state"] in ("ok", "missing"), entry
            assert (entry["state"] == "ok") == bool(entry["samples"])


def test_every_row_is_found_and_an_unknown_one_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from benchmarks.__main__ import load

    assert all(callable(load(path)) for _, path, _ in ROWS.values())
    assert sorted(number for number, _, _ in ROWS.values() if number) == list(range(1, 14))
    with pytest.raises(SystemExit):
        main(["decodre"])
    assert "no row 'decodre'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ROWS))
def test_each_row(name: str, tmp_path: Path) -> None:
    if name == "time-to-loss" and not DATA.is_dir():
        pytest.skip("tiny_shakespeare is not at hand")
    main([name, "--tiny", "--out", str(tmp_path / "bench.json")])
    check(json.loads((tmp_path / "bench.json").read_text()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["decoder", "masked", "finetune", "lora", "save", "generate"])
def test_each_row_on_a_gpu(name: str, tmp_path: Path) -> None:
    main([name, "--tiny", "--device", "cuda", "--out", str(tmp_path / "bench.json")])
    check(json.loads((tmp_path / "bench.json").read_text()))
