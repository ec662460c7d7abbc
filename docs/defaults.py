"""What the default of a fine-tuning run reaches: the experiments behind the rule for ``optim.lr: auto``.

    python docs/defaults.py pretrain                # small checkpoints, about 20 minutes of one CPU thread
    python docs/defaults.py run rates steps minilm  # the screening grids that the rule was chosen by
    python docs/defaults.py run final:mb128         # default, sweep, scratch, TF-IDF, linear probe
    python docs/defaults.py show mb128              # as a table
    python docs/defaults.py pretrain deep-1 deep-3 deep-10  # a deep and thin encoder after 1, 3 and 10 million tokens
    python docs/defaults.py run encoder             # on 200 labels of sentiment and topic, beside TF-IDF
    python docs/defaults.py show encoder            # as a table, and docs/figures/encoder.svg
    python docs/defaults.py run final:deep-10       # the table of tasks for the deep one, about five CPU hours
    python docs/defaults.py show deep-10

Data are looked for in PRETRAIN_TEST_DATA, everything is kept in ``--out``. Every run is one line of results.jsonl and
is not repeated, so that an interrupted experiment goes on where it stopped. ``--minilm`` names a directory of the
published all-MiniLM-L6-v2; without it that model is left out.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import itertools
import json
import os
import random
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transfer import labelled, wide_text, write

import pretrain
from pretrain.data.tables import read_table
from pretrain.finetuning.baseline import tfidf_baseline
from pretrain.utils.curves import Series, curve_svg

DATA = Path(os.environ.get("PRETRAIN_TEST_DATA", "../shared/data"))
Row = dict[str, Any]
Parts = tuple[list[Row], list[Row], list[Row]]

# ---------------------------------------------------------------------------- data


def _rows(path: str, **options: Any) -> list[Row]:
    return [dict(row) for row in read_table(DATA / path, **options).rows()]


def _plain(name: str) -> Parts:
    train, test = labelled(name)
    random.Random(0).shuffle(train)
    return train[:-500], train[-500:], test[:1000]


def _movies() -> Parts:
    rows = _rows("movie_reviews/reviews.jsonl.gz")
    parts = [[row for row in rows if row["split"] == part] for part in ("train", "dev", "test")]
    return parts[0], parts[1], parts[2]


def _sick() -> Parts:
    parts = [_rows(f"sick/{part}.txt", format="tsv") for part in ("train", "trial", "test")]
    return parts[0], parts[1], parts[2][:2000]


def _tsv(folder: str, names: tuple[str, str, str]) -> Parts:
    parts = [_rows(f"{folder}/{name}.tsv") for name in names]
    return parts[0], parts[1], parts[2]


def _queries() -> Parts:
    parts = []
    for part in ("train", "dev", "test"):
        with open(DATA / "query_wellformedness" / f"{part}.tsv", encoding="utf-8") as file:
            lines = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            parts.append([{"text": text, "label": float(score)} for text, score in lines])
    return parts[0], parts[1][:500], parts[2][:1000]


def _entities() -> Parts:
    parts = [_rows(f"wnut17/{part}.conll") for part in ("train", "dev", "test")]
    return parts[0], parts[1][:500], parts[2]


def _tags() -> Parts:
    parts = []
    for part in ("dev", "test"):
        table = read_table(DATA / "ud_english_ewt" / f"{part}.conllu")
        parts.append([dict(row) for row in table.rows()])
    return parts[0][:-300], parts[0][-300:], parts[1][:1000]


def _answers() -> Parts:
    rows = _rows("xquad_en/xquad.en.json")
    paragraphs = list(dict.fromkeys(row["context"] for row in rows))
    first, dev = set(paragraphs[:175]), set(paragraphs[175:190])
    train = [row for row in rows if row["context"] in first]
    valid = [row for row in rows if row["context"] in dev]
    return train, valid, [row for row in rows if row["context"] not in first | dev]


def _dialogues() -> list[dict[str, Any]]:
    found = []
    for part in ("001", "002", "003"):
        with gzip.open(DATA / "sgd_dialogues" / f"dialogues_{part}.json.gz", "rt") as file:
            found += json.load(file)
    return found


def _acts() -> Parts:
    """Utterances of users and all of their acts: several labels each; split by dialogue."""
    parts: list[list[Row]] = []
    dialogues = _dialogues()
    for chosen in (dialogues[:280], dialogues[280:320], dialogues[320:]):
        rows = []
        for turn in (t for one in chosen for t in one["turns"] if t["speaker"] == "USER"):
            acts = sorted({a["act"] for frame in turn["frames"] for a in frame["actions"]})
            rows.append({"text": turn["utterance"], "label": acts})
        parts.append(rows)
    return parts[0], parts[1], parts[2]


# name -> task, rows to learn from, figure, loader, keywords of finetune
TASKS: dict[str, tuple[str, int, str, Callable[[], Parts], dict[str, Any]]] = {
    "ag_news 200": ("classification", 200, "accuracy", lambda: _plain("ag_news"), {}),
    "ag_news 2000": ("classification", 2000, "accuracy", lambda: _plain("ag_news"), {}),
    "pros_cons 200": ("classification", 200, "accuracy", lambda: _plain("pros_cons"), {}),
    "pros_cons 6000": ("classification", 6000, "accuracy", lambda: _plain("pros_cons"), {}),
    "movie_reviews": ("classification", 1600, "accuracy", _movies, {"max_length": 512}),
    "sms_spam 500": ("classification", 500, "macro_f1", lambda: _plain("sms_spam"), {}),
    "banking77 1000": ("classification", 1000, "accuracy", lambda: _plain("banking77"), {}),
    "sick entailment": (
        *("classification", 2000, "accuracy", _sick),
        {"text": "sentence_A", "pair": "sentence_B", "label": "entailment_judgment"},
    ),
    "cad_nli": (
        *("classification", 1666, "accuracy"),
        lambda: _tsv("cad_nli", ("original_train", "original_dev", "original_test")),
        {},
    ),
    "acts (several)": ("classification", 1500, "micro_f1", _acts, {}),
    "sick relatedness": (
        *("regression", 2000, "pearson", _sick),
        {"text": "sentence_A", "pair": "sentence_B", "label": "relatedness_score"},
    ),
    "stsb": (
        *(
            "regression",
            2000,
            "pearson",
            lambda: _tsv("stsb_open_subset", ("train", "dev", "test")),
        ),
        {"label": "score"},
    ),
    "wellformedness": ("regression", 2000, "pearson", _queries, {}),
    "wnut17": ("token-classification", 2000, "f1", _entities, {}),
    "ud_tags 500": ("token-classification", 500, "accuracy", _tags, {}),
    "xquad": ("question-answering", 870, "f1", _answers, {"max_length": 192}),
}
_CACHE: dict[str, Parts] = {}


def rows_of(name: str, seed: int) -> Parts:
    """Rows to learn from (a subset drawn by the seed), to choose by and to score."""
    if name not in _CACHE:
        _CACHE[name] = TASKS[name][3]()
    train, valid, test = _CACHE[name]
    count = TASKS[name][1]
    # A user who has few labels holds out few of them.
    return (
        random.Random(seed).sample(train, min(count, len(train))),
        valid[: max(count // 4, 100)],
        test,
    )


# ---------------------------------------------------------------------------- checkpoints


def own_text() -> Iterator[str]:
    """The texts of the training rows, without labels."""
    for name in ("ag_news", "pros_cons", "banking77", "sms_spam"):
        yield from (row["text"] for row in labelled(name)[0][:6000])
    yield from (row["text"] for row in _movies()[0])
    yield from (f"{row['sentence_A']} {row['sentence_B']}" for row in _sick()[0])
    yield from (f"{row['sentence1']} {row['sentence2']}" for row in TASKS["cad_nli"][3]()[0])
    yield from (f"{row['sentence1']} {row['sentence2']}" for row in TASKS["stsb"][3]()[0])
    yield from (row["text"] for row in _queries()[0][:8000])


def _size(layers: int, width: int, times: int = 2) -> dict[str, Any]:
    heads = max(2, width // 32) if width < 256 else 4
    return {
        "num_layers": layers,
        "hidden_size": width,
        "num_heads": heads,
        "intermediate_size": times * width,
        "max_positions": 512,
    }


# The tasks of the part "encoder", whose own text, without labels, the deep checkpoints read beside general text.
FEW_LABELS = ("pros_cons", "ag_news")
MILLIONS = (1, 3, 10)
# name -> family, fields, minutes, learning rate
CHECKPOINTS: dict[str, tuple[str, dict[str, Any], float, float]] = {
    "mb128": ("modernbert", _size(2, 128) | {"classifier_pooling": "mean"}, 4.0, 2e-3),
    "mb128-long": ("modernbert", _size(2, 128) | {"classifier_pooling": "mean"}, 16.0, 2e-3),
    "mb64": ("modernbert", _size(2, 64) | {"classifier_pooling": "mean"}, 2.5, 3e-3),
    "bert128": ("bert", _size(2, 128, 4), 3.0, 2e-3),
    "mb256": ("modernbert", _size(4, 256) | {"classifier_pooling": "mean"}, 5.0, 1e-3),
    "gpt128": ("gpt2", _size(2, 128, 4), 3.0, 2e-3),
}


def pre_train_deep(name: str, out: Path) -> None:
    """A deep and thin encoder by Muon with a falling mask rate, on general text and that of the two tasks."""
    if (out / name / "best.json").exists():
        return
    texts = [row["text"] for of in FEW_LABELS for row in _plain(of)[0]]
    own, wide = write(out / "few.jsonl", texts), write(out / "wide.jsonl", wide_text())
    if not (out / "tok-few").exists():
        tokenizer = pretrain.train_tokenizer(
            [str(own), str(wide)], "wordpiece", vocab_size=6000, lowercase=True
        )
        tokenizer.save(out / "tok-few")
    began = time.process_time()
    pretrain.train(
        data={
            "train": {str(own): 0.6, str(wide): 0.4},
            "tokenizer": str(out / "tok-few"),
            "row_length": 128,
        },
        model={
            "family": "modernbert",
            "size": "tiny",
            "overrides": _size(6, 128) | {"classifier_pooling": "mean", "zero_init_outputs": True},
        },
        objective={"class_path": "MaskedLM", "init_args": {"rate": 0.3, "final_rate": 0.15}},
        optim={
            "name": "muon",
            "lr": 3e-3,
            "schedule": "wsd",
            "decay": 0.5,
            "min_lr": 0.0,
        },
        train={
            "out": str(out / name),
            "limit": f"{name.removeprefix('deep-')}e6 tokens",
            "eval_every": "25%",
            "eval_rows": 100,
            "save_every": "0 steps",
        },
        parallel={"threads": 1},
    )
    seconds = round(time.process_time() - began)
    (out / name / "cpu-seconds.json").write_text(json.dumps(seconds), encoding="utf-8")


def pre_train(name: str, out: Path) -> None:
    """One small checkpoint on general text and the tasks' own texts."""
    family, fields, minutes, lr = CHECKPOINTS[name]
    if (out / name / "best.json").exists():
        return
    own, wide = out / "own.jsonl", out / "wide.jsonl"
    if not own.exists():
        write(own, own_text())
        write(wide, wide_text())
    if not (out / "tok").exists():
        tokenizer = pretrain.train_tokenizer(
            [str(own), str(wide)], "wordpiece", vocab_size=8000, lowercase=True
        )
        tokenizer.save(out / "tok")
    masked = {"class_path": "MaskedLM", "init_args": {"rate": 0.3}}
    pretrain.train(
        data={
            "train": {str(own): 0.4, str(wide): 0.6},
            "tokenizer": str(out / "tok"),
            "row_length": 128,
        },
        model={"family": family, "size": "tiny", "overrides": fields},
        objective={"class_path": "NextToken"} if family == "gpt2" else masked,
        optim={"lr": lr, "schedule": "linear", "warmup": 0.05, "min_lr": 0.0, "weight_decay": 0.01},
        train={
            "out": str(out / name),
            "limit": f"{minutes} minutes",
            "eval_every": "25%",
            "eval_rows": 100,
            "save_every": "0 steps",
        },
        parallel={"threads": 1},
    )


# ---------------------------------------------------------------------------- runs


def fine_tuned(spec: dict[str, Any], model: str, out: Path) -> dict[str, Any]:
    """One fine-tuning run; figures of the held-out and test rows, of the best evaluation."""
    task, _, metric, _, keywords = TASKS[spec["task"]]
    train, valid, test = rows_of(spec["task"], spec["seed"])
    given = {k: v for k, v in spec.items() if k not in ("task", "model", "kind")}
    scratch = given.pop("scratch", False)
    if given.pop("watch", None) == "test":  # which of the evaluations was the best one
        valid = test
    source: Any = model
    if scratch:
        source = pretrain.load(model)
        source.init_weights(spec["seed"])
    folder = out / f"trial-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    result = pretrain.finetune(
        source,
        train,
        task=task,
        valid=valid,
        test=test,
        out=folder,
        threads=1,
        quiet=True,
        max_cut=1.0,
        monitor=metric,
        **{"max_length": 64, **keywords, **given},
    )
    if result.run.exit_code:
        raise SystemExit(result.run.exit_code)
    assert result.test_metrics is not None
    records = result.run.history
    curve = [[r["step"], r["eval"]["loss"], r["eval"][metric]] for r in records if "eval" in r]
    shutil.rmtree(folder, ignore_errors=True)
    return {
        "valid": result.metrics[metric],
        "test": result.test_metrics[metric],
        "trivial": result.trivial.get(metric),
        "steps": result.run.step,
        "curve": [[step, round(loss, 4), round(value, 4)] for step, loss, value in curve],
    }


def _texts(rows: list[Row], keywords: dict[str, Any]) -> list[Any]:
    left = keywords.get("text", "text" if "text" in rows[0] else "sentence1")
    right = keywords.get("pair", "sentence2")
    if right in rows[0]:
        return [(row[left], row[right]) for row in rows]
    return [row[left] for row in rows]


def classical(spec: dict[str, Any], model: str, out: Path) -> dict[str, Any]:
    """TF-IDF, or a linear probe of the checkpoint's frozen embeddings."""
    task, _, metric, _, keywords = TASKS[spec["task"]]
    parts = rows_of(spec["task"], spec["seed"])
    name = keywords.get("label", "label" if "label" in parts[0][0] else "gold_label")
    texts = [_texts(rows, keywords) for rows in parts]
    labels = [[row[name] for row in rows] for rows in parts]
    if task == "regression":
        labels = [[float(one) for one in column] for column in labels]
    args = [item for pair in zip(texts, labels, strict=True) for item in pair]
    if spec["kind"] == "tfidf":
        found = tfidf_baseline(*args, metric=metric)
    else:
        from pretrain.finetuning.baseline import embeddings, probe_baseline

        found = probe_baseline(embeddings(pretrain.load(model)), *args, metric=metric)
    return {"valid": found["score_valid"], "test": found["score_test"]}


def run(spec: dict[str, Any], out: Path, minilm: str) -> None:
    """Do one line of a grid unless it is there already."""
    path = out / "results.jsonl"
    key = json.dumps(spec, sort_keys=True)
    done = set()
    if path.exists():
        with open(path, encoding="utf-8") as file:
            done = {json.dumps(json.loads(line)["spec"], sort_keys=True) for line in file}
    model = minilm if spec["model"] == "minilm" else str(out / spec["model"])
    if key in done or not model:
        return
    began = time.process_time()
    work = classical if spec["kind"] in ("tfidf", "probe") else fine_tuned
    try:
        found = work(spec, model, out)
    except pretrain.errors.PretrainError as error:
        found = {"error": str(error)[:300]}
    line = {"spec": spec, "seconds": round(time.process_time() - began, 1), **found}
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    shown = {k: v for k, v in line.items() if k not in ("spec", "curve")}
    print(key, shown, flush=True)


# ---------------------------------------------------------------------------- grids

RATES = (4e-4, 1.2e-3, 3.6e-3)
FEW = ("ag_news 200", "banking77 1000", "wnut17", "sick relatedness", "sms_spam 500")


def _tune(task: str, model: str = "mb128", seed: int = 0, **settings: Any) -> dict[str, Any]:
    return {"kind": "tune", "task": task, "model": model, "seed": seed, **settings}


def grid(name: str) -> Iterator[dict[str, Any]]:
    """The runs of a part of the experiment, in an order in which a cut-off one is still of use."""
    part, _, model = name.partition(":")
    model = model or "mb128"
    if part == "rates":
        for task in FEW[:3]:
            for lr in RATES:
                yield _tune(task, model, lr=lr, limit="250 steps", batch_rows=16)
    if part == "widths":
        for task in ("banking77 1000", "pros_cons 200"):
            for lr in {"minilm": (1e-4, 2.5e-4, 6e-4), "mb256": (2e-4, 6e-4, 1.8e-3)}.get(
                model, (1.3e-3, 4e-3, 1.2e-2)
            ):
                if model != "minilm" or task == "pros_cons 200":
                    yield _tune(task, model, lr=lr, limit="250 steps")
    if part == "probe":
        yield {"kind": "probe", "task": "pros_cons 200", "model": "minilm", "seed": 0}
        yield {"kind": "tfidf", "task": "pros_cons 200", "model": "minilm", "seed": 0}
    if part == "minilm":
        for seed, lr in ((0, 1.5e-4), (1, 1.5e-4), (0, 5e-5), (1, 5e-5)):
            yield _tune("pros_cons 200", "minilm", seed, lr=lr, limit="140 steps")
            for kind in ("probe", "tfidf"):
                yield {"kind": kind, "task": "pros_cons 200", "model": "minilm", "seed": seed}
    if part == "rule":
        for task in ("banking77 1000", "ag_news 200"):
            yield _tune(task, model)
            yield _tune(task, model, lr=1.3e-3)
    if part == "steps":
        for task in FEW[1:4]:
            for steps, lr in ((250, 2e-3), (750, 2e-3), (250, 4e-3), (750, 1e-3)):
                yield _tune(task, model, lr=lr, limit=f"{steps} steps")
    if part == "selection":
        for task in TABLE[:-2]:
            yield _tune(task, model, watch="test")
    if part == "encoder":
        for seed, task in itertools.product(range(SEEDS), FEW_LABELS):
            of = {"task": f"{task} 200", "seed": seed}
            for millions in MILLIONS:
                yield {"kind": "probe", "model": f"deep-{millions}", **of}
                yield {"kind": "tune", "model": f"deep-{millions}", **of}
            yield {"kind": "tfidf", "model": "deep-1", **of}
        for seed, task in itertools.product(range(SEEDS), FEW_LABELS):
            yield _tune(f"{task} 200", "deep-1", seed, scratch=True)
    if part.startswith("final"):  # final, or final1 and final2 for two processes
        yield from _final(model, {"final1": TABLE[::2], "final2": TABLE[1::2]}.get(part, TABLE))
    if part == "lora":
        for factor in (1, 1 / 3, 1 / 10):
            yield _tune("banking77 1000", model, lora=8, lr=float(f"{1.3e-2 * factor:.2g}"))
    if part == "family":
        for task in ("banking77 1000", "pros_cons 200"):
            yield _tune(task, model)
            yield _tune(task, model, scratch=True)
            yield _tune(task, model, lr=4.3e-4)


# The tasks of the table; the rate of the default times these is the sweep of five.
TABLE = (
    *("banking77 1000", "pros_cons 200", "ag_news 200", "acts (several)", "sms_spam 500", "wnut17"),
    *("sick relatedness", "sick entailment", "ud_tags 500", "cad_nli", "wellformedness"),
    *("stsb", "movie_reviews", "xquad"),
)
SWEEP = (2.0, 1 / 2, 4.0, 1 / 4)
SEEDS = 3
# The rates that the rule gives these checkpoints.
DEFAULT = {"mb64": 2e-3, "mb128": 1.3e-3, "bert128": 1.3e-3, "mb256": 3.2e-4, "minilm": 1.4e-4}
# Five fixed rates, chosen before the default of this checkpoint was; the default is not one of them.
FIXED = {"deep-10": (3.2e-4, 6.5e-4, 1.3e-3, 2.6e-3, 5.2e-3)}
DEFAULT |= {"deep-10": 7.5e-4}


def _swept(model: str) -> list[float]:
    """The rates of the sweep beside the default."""
    name = model.removesuffix("-long")
    return [*FIXED.get(name, (float(f"{DEFAULT[name] * factor:.2g}") for factor in SWEEP))]


def _final(model: str, tasks: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Default and sweep, then the baselines and training from scratch, one seed after the other."""
    for seed in range(SEEDS):
        for task in tasks:
            yield _tune(task, model, seed)
            for rate in _swept(model):
                yield _tune(task, model, seed, lr=rate)
        for task in tasks:
            yield _tune(task, model, seed, scratch=True)
            if TASKS[task][0] in ("classification", "regression") and "several" not in task:
                for kind in ("tfidf", "probe"):
                    yield {"kind": kind, "task": task, "model": model, "seed": seed}


def table(model: str, out: Path) -> str:
    """task x default x sweep x scratch x TF-IDF x linear probe: means over seeds, in % of the figure on the test rows.

    Of the sweep there are two figures: of the rate that is best on the held-out rows of each seed, which is what a user
    gets, and of the one with the best mean on the test rows, which nobody can know, with that rate.
    """
    with open(out / "results.jsonl", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    rates = _swept(model)
    rows = ["| task | figure | seeds | default | sweep | best rate | scratch | TF-IDF | probe |"]
    rows.append("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for task in TABLE:
        groups: dict[str, dict[int, float]] = {}
        held_out: dict[str, dict[int, float]] = {}
        for line in lines:
            spec = line["spec"]
            if spec["task"] != task or spec["model"] != model or "test" not in line:
                continue
            if set(spec) - {"kind", "task", "model", "seed", "lr", "scratch"}:
                continue  # of the screening
            name = "scratch" if spec.get("scratch") else spec["kind"]
            if "lr" in spec:
                if spec["lr"] not in rates:
                    continue
                name = f"{spec['lr']:g}"
            groups.setdefault(name, {})[spec["seed"]] = 100 * line["test"]
            held_out.setdefault(name, {})[spec["seed"]] = line["valid"]
        if "tune" not in groups:
            continue
        tried = [*(["tune"] if model not in FIXED else []), *(f"{rate:g}" for rate in rates)]
        seeds = [s for s in groups["tune"] if all(s in groups.get(name, {}) for name in tried)]
        sweep = [groups[max(tried, key=lambda n, s=s: held_out[n][s])][s] for s in seeds]
        cells = [task, TASKS[task][2], str(len(seeds)), _mean([*groups["tune"].values()])]
        if seeds:
            means = {n: statistics.fmean(groups[n][s] for s in seeds) for n in tried}
            best = max(means, key=lambda n: means[n])
            cells += [_mean(sweep), f"{means[best]:.1f} ({best.replace('tune', 'the default')})"]
        else:
            cells += ["–", "–"]
        cells += [_mean([*groups.get(n, {}).values()]) for n in ("scratch", "tfidf", "probe")]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def encoder_table(out: Path) -> str:
    """What few labels reach by how much the encoder has read, beside TF-IDF and training from scratch; draws it too."""
    found: dict[tuple[str, str], list[float]] = {}
    with open(out / "results.jsonl", encoding="utf-8") as file:
        for line in map(json.loads, file):
            spec = line["spec"]
            if spec["model"].startswith("deep") and "test" in line and "lr" not in spec:
                kind = "scratch" if spec.get("scratch") else spec["kind"]
                millions = spec["model"].removeprefix("deep-") if kind in ("probe", "tune") else ""
                found.setdefault((spec["task"], kind + millions), []).append(100 * line["test"])
    rows = [
        "| task, 200 labels | tokens read | CPU seconds | fine-tuned | probe | TF-IDF | scratch |"
    ]
    rows.append("|---|---:|---:|---:|---:|---:|---:|")
    curves, references = [], {}
    for task in FEW_LABELS:
        of = {kind: scores for (name, kind), scores in found.items() if name == f"{task} 200"}
        for millions in MILLIONS:
            seconds = json.loads((out / f"deep-{millions}" / "cpu-seconds.json").read_text())
            cells = [_mean(of.get(f"{kind}{millions}", [])) for kind in ("tune", "probe")]
            cells += [_mean(of.get(kind, [])) for kind in ("tfidf", "scratch")]
            rows.append(f"| {task} | {millions} M | {seconds:,} | {' | '.join(cells)} |")
        for kind, word in (("tune", "fine-tuned"), ("probe", "probe")):
            points = [(m, statistics.fmean(of[f"{kind}{m}"])) for m in MILLIONS]
            curves.append(Series(f"{task}, {word}", points, dots=True))
        references[f"{task}, TF-IDF"] = statistics.fmean(of["tfidf"])
    picture = curve_svg(
        curves,
        title="accuracy in % with 200 labels",
        x_label="million tokens read",
        references=references,
        log_x=True,
    )
    (Path(__file__).parent / "figures/encoder.svg").write_text(picture, encoding="utf-8")
    return "\n".join(rows)


def selection(model: str, out: Path) -> str:
    """What other choices among the evaluations of a run would have reached on the test rows, in %.

    ``best`` is the evaluation with the best held-out figure, of equal ones that with the lower loss; ``last`` the last
    one; ``within K`` the one with the lowest loss among those whose figure is at most K points below the best; ``any``
    the one that is best on the test rows.
    """
    curves: dict[tuple[str, int], dict[str, list[list[float]]]] = {}
    with open(out / "results.jsonl", encoding="utf-8") as file:
        for line in map(json.loads, file):
            spec = line["spec"]
            if spec["model"] != model or set(spec) - {"kind", "task", "model", "seed", "watch"}:
                continue
            if "curve" in line:
                of = curves.setdefault((spec["task"], spec["seed"]), {})
                of["test" if "watch" in spec else "valid"] = line["curve"]
    names = ["best", "last", *(f"within {k}" for k in (0.5, 1, 2)), "any"]
    rows = ["| task | " + " | ".join(names) + " |", "|---" + "|---:" * len(names) + "|"]
    for (task, _), both in curves.items():
        if len(both) < 2:
            continue
        valid, test = both["valid"], [100 * one[2] for one in both["test"]]
        top = max(one[2] for one in valid)
        places = [max(range(len(valid)), key=lambda i: (valid[i][2], -valid[i][1])), -1]
        for k in (0.5, 1, 2):
            near = [i for i, one in enumerate(valid) if one[2] >= top - k / 100]
            places.append(min(near, key=lambda i: valid[i][1]))
        rows.append(
            f"| {task} | "
            + " | ".join(f"{x:.1f}" for x in [*(test[i] for i in places), max(test)])
            + " |"
        )
    return "\n".join(rows)


def _mean(values: list[float]) -> str:
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("pretrain", "run", "show", "selection"))
    parser.add_argument("names", nargs="*")
    parser.add_argument("--out", type=Path, default=Path("runs/defaults"))
    parser.add_argument("--minilm", default="")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.what == "pretrain":
        for name in args.names or CHECKPOINTS:
            (pre_train_deep if name.startswith("deep") else pre_train)(name, args.out)
    elif args.what == "run":
        for part in args.names:
            for spec in grid(part):
                run(spec, args.out, args.minilm)
    else:
        for model in args.names or ("mb128",):
            if model == "encoder":
                print(encoder_table(args.out))
                continue
            print((table if args.what == "show" else selection)(model, args.out))


if __name__ == "__main__":
    main()
