"""Classical baselines at few labels on four sets: what a pre-trained model has to beat.

    python docs/baselines.py [--data FOLDER] [--sets ag_news sms_spam] [--equal]

Training rows whose normalised text recurs in the test rows are dropped and counted. Per seed one order of the rows of
each class: the first ones are the subset, in proportion to the classes or, with --equal, as many of each; the last
ones, 200 in all, choose C and the stop words. LSA reads the text of all training rows. Mean ± standard deviation over
5 subsets, in percent; "fixed" is C = 10 and no stop words, chosen on nothing; s marks stop words in the last column.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import unicodedata
from pathlib import Path

import numpy as np

from pretrain.finetuning.baseline import Lsa, lsa_baseline, tfidf_baseline

Rows = list[tuple[str, str]]  # (text, label)
SETS = {  # label counts, metric
    "ag_news": ((100, 200, 1000), "accuracy"),
    "pros_cons": ((100, 200, 1000), "accuracy"),
    "banking77": ((231, 385, 1001), "accuracy"),
    "sms_spam": ((100, 200, 500), "macro_f1"),
}
VALID = 200


def read(folder: Path, name: str) -> tuple[Rows, Rows]:
    if name == "sms_spam":
        lines = (folder / name / "sms.tsv").read_text(encoding="utf-8").splitlines()
        rows = [(text, label) for label, text in (line.split("\t", 1) for line in lines)]
        return rows[:-1000], rows[-1000:]
    return tuple(table(folder / name / f"{part}.csv", name) for part in ("train", "test"))


def table(path: Path, name: str) -> Rows:
    with path.open(encoding="utf-8", newline="") as file:
        if name == "ag_news":
            return [(f"{title} {body}", label) for label, title, body in csv.reader(file)]
        label = "label" if name == "pros_cons" else "category"
        return [(row["text"], row[label]) for row in csv.DictReader(file)]


def plain(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(c if c.isalnum() else " " for c in folded).split())


def share(sizes: list[int], total: int, equal: bool) -> list[int]:
    """Split a total over classes by largest remainder; every class gets at least one."""
    exact = [total * (1 / len(sizes) if equal else size / sum(sizes)) for size in sizes]
    order = sorted(range(len(sizes)), key=lambda i: int(exact[i]) - exact[i])
    extra = set(order[: total - sum(map(int, exact))])
    return [max(1, int(part) + (i in extra)) for i, part in enumerate(exact)]


def draw(labels: np.ndarray, count: int, seed: int, equal: bool) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    groups = [rng.permutation(np.flatnonzero(labels == one)) for one in np.unique(labels)]
    sizes = list(map(len, groups))
    first = [g[:k] for g, k in zip(groups, share(sizes, count, equal), strict=True)]
    last = [g[len(g) - k :] for g, k in zip(groups, share(sizes, VALID, False), strict=True)]
    return np.concatenate(first), np.concatenate(last)


def measure(folder: Path, name: str, equal: bool) -> None:
    counts, metric = SETS[name]
    train, test = read(folder, name)
    held_out, seen = ({plain(text) for text, _ in part} for part in (test, train))
    kept = [row for row in train if plain(row[0]) not in held_out]
    recur = sum(plain(text) in seen for text, _ in test)
    print(
        f"\n{name}: {metric}; {len(kept):,} training rows, {len(train) - len(kept)} dropped", end=""
    )
    print(f" that recur in the test ({recur} of its {len(test):,} rows)")
    print("labels   TF-IDF tuned     LSA tuned  TF-IDF fixed     LSA fixed   C (TF-IDF | LSA)")
    texts, labels = [text for text, _ in kept], np.array([label for _, label in kept])
    space, bare = Lsa(texts), Lsa(texts, stop_words=(None,))
    for count in counts:
        runs = []
        for seed in range(5):
            places = draw(labels, count, seed, equal)
            rows = [part for at in places for part in ([texts[i] for i in at], labels[at].tolist())]
            rows += [[text for text, _ in test], [label for _, label in test]]
            tuned = {"metric": metric, "seed": seed}
            fixed = {**tuned, "grid": (10,)}
            runs.append((
                tfidf_baseline(*rows, **tuned),
                lsa_baseline(space, *rows, **tuned),
                tfidf_baseline(*rows, **fixed, stop_words=(None,)),
                lsa_baseline(bare, *rows, **fixed),
            ))  # fmt: skip
        columns = [[100 * run[i]["score_test"] for run in runs] for i in range(4)]
        cells = [f"{statistics.mean(c):7.1f} ± {statistics.stdev(c):3.1f}" for c in columns]
        chosen = [
            " ".join(f"{r[i]['C']:g}{'s' * bool(r[i]['settings']['stop_words'])}" for r in runs)
            for i in range(2)
        ]
        print(f"{count:>6} ", *cells, " ", " | ".join(chosen), flush=True)


def main() -> None:
    here = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("PRETRAIN_TEST_DATA", here))
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--equal", action="store_true", help="as many rows of every class")
    options = parser.parse_args()
    for name in options.sets:
        measure(Path(options.data), name, options.equal)


if __name__ == "__main__":
    main()
