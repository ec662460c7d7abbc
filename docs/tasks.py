"""Every task once on real data with the defaults, beside a trivial baseline: the figures behind docs/results.md.

    python docs/tasks.py entities --model runs/transfer/ag_news-wide
    python docs/tasks.py chat                       # pre-trains a small decoder on general text first

Data are looked for in PRETRAIN_TEST_DATA. One CPU thread, one seed. Each line goes to ``--out``/tasks.jsonl.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pretrain
from pretrain.data.tables import read_table
from pretrain.metrics import exact_match, token_f1

DATA = Path(os.environ.get("PRETRAIN_TEST_DATA", "../shared/data"))
Figures = dict[str, float]


def entities(model: str, out: Path) -> tuple[Figures, Figures]:
    """WNUT 2017; the baseline gives every word the tag it had most often in training."""
    files = [DATA / "wnut17" / f"{part}.conll" for part in ("train", "dev", "test")]
    result = pretrain.finetune(
        model,
        files[0],
        task="token-classification",
        valid=files[1],
        test=files[2],
        out=out,
        threads=1,
    )
    assert result.test_metrics is not None
    return result.test_metrics, {"f1": 0.0}


def sick(part: str) -> Any:
    return read_table(DATA / "sick" / f"{part}.txt", format="tsv")


def on_sick(model: str, out: Path, task: str, label: str) -> Figures:
    """Fine-tune on the pairs of SICK; figures on the test rows."""
    result = pretrain.finetune(
        model,
        sick("train"),
        task=task,
        valid=sick("trial"),
        test=sick("test"),
        text="sentence_A",
        pair="sentence_B",
        label=label,
        out=out,
        threads=1,
    )
    assert result.test_metrics is not None
    return result.test_metrics


def entailment(model: str, out: Path) -> tuple[Figures, Figures]:
    """SICK, three classes; the baseline is the most frequent one."""
    label = "entailment_judgment"
    labels = sick("test").columns[label]
    most = Counter(sick("train").columns[label]).most_common(1)[0][0]
    figures = on_sick(model, out, "classification", label)
    return figures, {"accuracy": labels.count(most) / len(labels)}


def relatedness(model: str, out: Path) -> tuple[Figures, Figures]:
    """SICK, scores 1 to 5; the baseline is the mean, which correlates with nothing."""
    label = "relatedness_score"
    wanted = [float(x) for x in sick("test").columns[label]]
    known = [float(x) for x in sick("train").columns[label]]
    mean = sum(known) / len(known)
    error = sum((x - mean) ** 2 for x in wanted) / len(wanted)
    return on_sick(model, out, "regression", label), {"pearson": 0.0, "mse": error}


def answers(model: str, out: Path) -> tuple[Figures, Figures]:
    """XQuAD in English, 190 paragraphs to learn from; the baseline answers with the first sentence."""
    rows = list(read_table(DATA / "xquad_en" / "xquad.en.json").rows())
    paragraphs = list(dict.fromkeys(row["context"] for row in rows))
    first, dev = set(paragraphs[:175]), set(paragraphs[175:190])
    train = [row for row in rows if row["context"] in first]
    valid = [row for row in rows if row["context"] in dev]
    test = [row for row in rows if row["context"] not in first | dev]
    result = pretrain.finetune(
        model,
        train,
        task="question-answering",
        valid=valid,
        test=test,
        out=out,
        max_length=256,
        threads=1,
    )
    gold = [row["answers"]["text"] for row in test]
    guess = [row["context"].split(". ")[0] for row in test]
    pairs = list(zip(guess, gold, strict=True))
    assert result.test_metrics is not None
    return result.test_metrics, {
        "exact_match": sum(exact_match(a, b) for a, b in pairs) / len(pairs),
        "f1": sum(token_f1(a, b) for a, b in pairs) / len(pairs),
    }


def dialogues() -> list[dict[str, Any]]:
    found = []
    for part in ("001", "002", "003"):
        path = DATA / "sgd_dialogues" / f"dialogues_{part}.json.gz"
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for one in json.load(file):
                roles = {"USER": "user", "SYSTEM": "assistant"}
                turns = [
                    {"role": roles[turn["speaker"]], "content": turn["utterance"]}
                    for turn in one["turns"]
                ]
                found.append({"messages": turns})
    return found


def decoder(out: Path, minutes: float = 5.0) -> Path:
    """A small decoder that has read general English for some minutes."""
    from transfer import wide_text, write

    source = write(out / "wide.jsonl", wide_text())
    run = pretrain.train(
        data={"train": str(source), "vocab_size": 6000, "row_length": 256},
        model={"family": "qwen3", "size": "tiny", "overrides": {"max_positions": 1024}},
        optim={"lr": 2e-3, "schedule": "linear", "warmup": 0.05, "min_lr": 0.0},
        train={
            "out": str(out / "wide-gpt"),
            "limit": f"{minutes} minutes",
            "batch_rows": 16,
            "eval_every": "20%",
            "eval_rows": 100,
            "save_every": "0 steps",
        },
        parallel={"threads": 1},
    )
    return run.path


def chat(model: str, out: Path) -> tuple[Figures, Figures]:
    """Schema-guided dialogues; the baseline knows how often each token occurs in the assistant's turns."""
    model = model or str(decoder(out.parent))
    rows = dialogues()
    train, valid, test = rows[:300], rows[300:340], rows[340:]
    result = pretrain.finetune(
        model, train, task="chat", valid=valid, test=test, out=out, threads=1
    )
    tokenizer = result.model.tokenizer
    assert tokenizer is not None and result.test_metrics is not None
    said: list[list[int]] = []
    for part in (train, test):
        turns = [m["content"] for row in part for m in row["messages"] if m["role"] == "assistant"]
        said.append([i for ids in tokenizer.encode_batch(turns) for i in ids])
    counts, size = Counter(said[0]), len(tokenizer)
    whole = len(said[0]) + size
    unigram = -sum(math.log((counts[i] + 1) / whole) for i in said[1]) / len(said[1])
    print(result.model.chat("I am looking for a restaurant in San Jose."))
    return result.test_metrics, {"loss": unigram}


TASKS = {
    "entities": entities,
    "entailment": entailment,
    "relatedness": relatedness,
    "answers": answers,
    "chat": chat,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="+", choices=sorted(TASKS))
    parser.add_argument("--model", default="", help="an encoder; chat trains its own without one")
    parser.add_argument("--out", type=Path, default=Path("runs/tasks"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.names:
        figures, trivial = TASKS[name](args.model, args.out / name)
        line = json.dumps({"task": name, "figures": figures, "trivial": trivial})
        print(line)
        with open(args.out / "tasks.jsonl", "a", encoding="utf-8") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
