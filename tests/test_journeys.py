"""The journeys of the documentation: every command that they type is understood; none is run."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import journeys
import pytest

from test_commands import check_ours


class Dry(journeys.Journey):
    """A journey whose commands are parsed, and whose notebook is read."""

    def run(self, command: str, *, until: str | None = None) -> str:
        command = command.replace("{minutes}", f"{self.minutes:g}")
        self.commands.append(command)
        *before, last = command.split(" | ")
        assert all(shlex.split(part)[0] == "echo" for part in before), command
        words = shlex.split(last)
        assert words[0] == "pretrain", command
        with pytest.MonkeyPatch.context() as patch:
            check_ours(words[1:], patch)
        return ""

    def execute(self, path: Path) -> str:
        nbformat = pytest.importorskip("nbformat")
        cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
        assert any(journeys.NOTEBOOK_LIMIT in cell.source for cell in cells), (
            "its time is not limited"
        )
        for cell in cells:
            compile(cell.source, path.name, "exec")
            self.commands.append(cell.source)
        return "\n".join(output.get("text", "") for cell in cells for output in cell.outputs)


@pytest.fixture
def dry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data_sets: Path, capsys: Any
) -> journeys.Journey:
    monkeypatch.setattr(journeys, "DATA", data_sets)
    monkeypatch.setattr(journeys, "Journey", Dry)
    monkeypatch.setattr(journeys, "_weights", lambda journey, run: b"")
    monkeypatch.setattr(subprocess, "run", lambda *words, **options: None)
    return Dry(tmp_path, 1.0)


@pytest.mark.parametrize("name", list(journeys.JOURNEYS))
def test_every_command_of_a_journey_is_understood(name: str, dry: journeys.Journey) -> None:
    journeys.JOURNEYS[name](dry)
    assert len(dry.commands) >= 2 and dry.said
    if name == "chat":
        assert " | pretrain chat " in dry.commands[-1]
    if name == "notebook":
        assert re.fullmatch(r"test accuracy 0\.\d+", dry.said[0]), "as stored in the notebook"


def test_a_wrong_command_is_found(dry: journeys.Journey) -> None:
    for command in ("pretrain train --no_such 1", "pretrain chat", "rm -r runs"):
        with pytest.raises(AssertionError):
            dry.run(command)


def test_the_usage_names_every_journey() -> None:
    usage = re.search(r"\[([\w ]+)\]", journeys.__doc__ or "")
    assert usage and usage[1].split() == list(journeys.JOURNEYS)


def test_a_notebook_is_executed_in_the_folder_of_its_journey(tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    cell = (
        f"limits = {{{journeys.NOTEBOOK_LIMIT}}}\nopen('made', 'w').close()\nprint(limits['limit'])"
    )
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    nbformat.write(made, tmp_path / "small.ipynb")
    journey = journeys.Journey(tmp_path, 0.5)
    assert journey.execute(tmp_path / "small.ipynb") == "0.5 minutes\n"
    assert (tmp_path / "made").is_file() and len(journey.commands) == 1
