"""First days with the package, typed as a new user would: how many commands they take, how long, and what comes out.

    python docs/journeys.py [gpt bert labels chat notebook resume processes] [--minutes 2] [--keep FOLDER]

Every journey begins in an empty folder with files of PRETRAIN_TEST_DATA, and runs its commands one after the other in a
shell; that of the notebook runs its cells in a kernel. Training ends after so many minutes, which are in the times; a
command or cell that fails ends the program. The figures printed after each are those of the table in docs/compared.md.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

DATA = Path(os.environ.get("PRETRAIN_TEST_DATA", "../shared/data")).resolve()
NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "finetune.ipynb"
NOTEBOOK_LIMIT = '"limit": "2 minutes"'  # of its pre-training
LIMIT = "--limit '{minutes} minutes'"
GPT = f"pretrain train --data books --model llama:mini --out runs/gpt {LIMIT}"
BERT = f"--model bert:mini --objective masked-lm --out runs/bert {LIMIT}"
STEPS = "pretrain train --data books --model llama:tiny --row_length 128 --limit 60 --save_every 10 --out runs/"


@dataclass
class Journey:
    """A journey in its folder.

    Attributes:
        folder: where its commands run.
        minutes: limit of each training.
        commands: what was typed; of a notebook, its cells.
        said: what the journey came to.
    """

    folder: Path
    minutes: float
    commands: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def run(self, command: str, *, until: str | None = None) -> str:
        """Run a command of the user and return what it printed.

        Args:
            command: for the shell; ``{minutes}`` is filled in.
            until: kill it once its output matches this pattern.

        Raises:
            SystemExit: it failed.
        """
        command = command.replace("{minutes}", f"{self.minutes:g}")
        self.commands.append(command)
        print(f"$ {command}", flush=True)
        process = subprocess.Popen(
            command, shell=True, cwd=self.folder, stdout=subprocess.PIPE, text=True,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        assert process.stdout is not None
        lines, killed = [], False
        for line in process.stdout:
            lines.append(line)
            print(line, end="", flush=True)
            if until is not None and not killed and re.search(until, line):
                os.killpg(process.pid, signal.SIGKILL)
                killed = True
        if process.wait() and not killed:
            sys.exit(f"{command}\nended with {process.returncode}.")
        if until is not None and not killed:
            sys.exit(f"{command}\nended before a line matched {until!r}.")
        return "".join(lines)

    def execute(self, path: Path) -> str:
        """Execute a notebook in a kernel and return what its cells printed."""
        import nbclient
        import nbformat

        notebook = nbformat.read(path, as_version=4)
        cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        for cell in cells:
            instead = NOTEBOOK_LIMIT.replace("2", f"{self.minutes:g}")
            cell.source = cell.source.replace(NOTEBOOK_LIMIT, instead)
            self.commands.append(cell.source)
        place = {"metadata": {"path": str(self.folder)}}
        client = nbclient.NotebookClient(
            notebook, timeout=None, kernel_name="python3", resources=place
        )
        client.execute()
        outputs = [output for cell in cells for output in cell.outputs]
        texts = [o.get("text") or o.get("data", {}).get("text/plain", "") for o in outputs]
        return "\n".join(texts)

    def books(self, count: int = 600) -> None:
        """Write some chapters of books as text files."""
        (self.folder / "books").mkdir()
        with gzip.open(DATA / "books" / "books.jsonl.gz", "rt", encoding="utf-8") as lines:
            for i, line in zip(range(count), lines, strict=False):
                text = json.loads(line)["text"]
                (self.folder / "books" / f"{i}.txt").write_text(text, encoding="utf-8")


def closing(text: str) -> str:
    """Return what a training run says at its end of its best evaluation."""
    found = re.findall(r"best validation \w+ [\d.]+", text)
    return found[-1] if found else "no evaluation"


def answer(text: str) -> str:
    """Return the first line of an answer, behind the line on what was loaded."""
    lines = [line for line in text.splitlines() if line.strip() and " tensors, " not in line]
    return lines[0].strip() if lines else "nothing"


def gpt(journey: Journey) -> None:
    """Own text to a GPT that writes."""
    journey.books()
    trained = journey.run(GPT)
    text = journey.run("pretrain generate runs/gpt 'It was' --max_new_tokens 20 --seed 0")
    journey.run("pretrain report runs/gpt")
    journey.said.append(f"{closing(trained)}; writes {answer(text)!r}")


def bert(journey: Journey) -> None:
    """Own text to a BERT, filled masks and search."""
    journey.books()
    trained = journey.run(f"pretrain train --data books {BERT}")
    text = journey.run("pretrain fill-mask runs/bert 'He went to the [MASK].'")
    (journey.folder / "lines.txt").write_text(
        "The ship sailed at dawn.\nShe wrote a long letter.\nThe storm broke the mast.\n"
    )
    journey.run("pretrain search runs/bert 'a boat at sea' lines.txt")
    journey.said.append(f"{closing(trained)}; fills {answer(text)!r}")


def labels(journey: Journey) -> None:
    """A labelled table to a classifier and a file of answers, from a BERT of the table's own texts."""
    lines = (DATA / "sms_spam" / "sms.tsv").read_text(encoding="utf-8").splitlines()
    for name, part in (("train", lines[:-1000]), ("test", lines[-1000:])):
        text = "\n".join(["label\ttext", *part])
        (journey.folder / f"{name}.tsv").write_text(text, encoding="utf-8")
    journey.run(f"pretrain train --data train.tsv {BERT}")
    journey.run(
        "pretrain finetune --model runs/bert --task classification --data train.tsv --data.valid 0.1 --out runs/spam"
    )
    text = journey.run("pretrain evaluate runs/spam --data test.tsv")
    journey.run("pretrain predict runs/spam test.tsv --out answers.csv")
    journey.said.append(" ".join(text.split()[2:4]))


def chat(journey: Journey) -> None:
    """A checkpoint that transformers has written to a chat model, by LoRA."""
    journey.books()
    journey.run(GPT)
    # Not typed by the user: it makes the directory that would come from the Hub.
    code = (
        "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; d='runs/gpt/model'; "
        "M.from_pretrained(d).save_pretrained('theirs'); T.from_pretrained(d).save_pretrained('theirs')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=journey.folder, check=True)
    with open(DATA / "self_instruct_human" / "seed_tasks.jsonl", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    with open(journey.folder / "chats.jsonl", "w", encoding="utf-8") as file:
        for row in rows:
            asked = "\n".join(
                part for part in (row["instruction"], row["instances"][0]["input"]) if part
            )
            file.write(json.dumps({"prompt": asked, "completion": row["instances"][0]["output"]}) + "\n")  # fmt: skip
    method = "--task chat --data.valid 0.1 --method.lora 16"
    tuned = journey.run(
        f"pretrain finetune --model theirs {method} --data chats.jsonl --out runs/chat"
    )
    text = journey.run("echo 'Name three animals.' | pretrain chat runs/chat --max_new_tokens 24")
    journey.said.append(f"{closing(tuned)}; says {answer(text)!r}")


def notebook(journey: Journey) -> None:
    """A notebook, cell by cell: a checkpoint, labelled rows, a classifier, its mistakes, an adapter."""
    found = re.findall(r"test: .*?(accuracy [\d.]+)", journey.execute(NOTEBOOK))
    journey.said.append(f"test {found[0]}" if found else "no test figure")


def _weights(journey: Journey, run: str) -> bytes:
    return (journey.folder / run / "model" / "model.safetensors").read_bytes()


def resume(journey: Journey) -> None:
    """A run that is killed, and the same command again."""
    journey.books(100)
    journey.run(STEPS + "killed", until=r"step 2\d")
    journey.run(STEPS + "killed")
    whole = Journey(journey.folder, journey.minutes)  # not typed by the user: what to compare with
    whole.run(STEPS + "whole")
    same = _weights(journey, "runs/killed") == _weights(whole, "runs/whole")
    journey.said.append(f"weights bit for bit those of a run that nobody killed: {same}")


def processes(journey: Journey) -> None:
    """A run that goes on in two processes."""
    journey.books(100)
    journey.run(STEPS + "two", until=r"step 2\d")
    two = closing(journey.run(STEPS + "two --devices 2"))
    one = Journey(journey.folder, journey.minutes)
    journey.said.append(f"{two}; in one process throughout {closing(one.run(STEPS + 'one'))}")


JOURNEYS: dict[str, Callable[[Journey], None]] = {
    made.__name__: made for made in (gpt, bert, labels, chat, notebook, resume, processes)
}


def main() -> None:
    """Run the journeys that are named, or all, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(JOURNEYS)}; not given, all")
    parser.add_argument("--minutes", type=float, default=2.0, help="limit of each training")
    parser.add_argument("--keep", type=Path, help="folder that keeps what was made")
    options = parser.parse_args()
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    rows = [
        "| journey | commands | minutes | CPU minutes | result |",
        "|---|---:|---:|---:|---|",
    ]
    with tempfile.TemporaryDirectory() as made:
        for name in options.names or JOURNEYS:
            folder = (options.keep or Path(made)) / name
            folder.mkdir(parents=True)
            journey = Journey(folder, options.minutes)
            began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
            JOURNEYS[name](journey)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            minutes = (time.monotonic() - began) / 60
            doc = (JOURNEYS[name].__doc__ or "").rstrip(".")
            rows.append(
                f"| {doc} | {len(journey.commands)} | {minutes:.1f} | {spent / 60:.1f} | {'; '.join(journey.said)} |"
            )
            print("\n", "\n".join(rows), "\n", sep="", flush=True)


if __name__ == "__main__":
    main()
