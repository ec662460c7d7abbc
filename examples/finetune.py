"""Fine-tune a checkpoint on a table of labelled texts, compare with the same model from scratch, write a report.

python examples/finetune.py runs/books-bert reviews.csv
python examples/finetune.py runs/books-bert reviews.csv --text comment --label stars --lora 8
python examples/finetune.py runs/books-bert reviews.csv --no-compare     # the run alone, without the other arm
"""

from __future__ import annotations

import argparse

import pretrain
from pretrain.errors import DataError

parser = argparse.ArgumentParser(description="Fine-tune a checkpoint on a table of labelled texts.")
parser.add_argument("checkpoint", help="a run, a checkpoint, or a Hugging Face directory")
parser.add_argument("rows", help=".csv, .tsv, .jsonl, .json or .parquet")
parser.add_argument("--task", default="classification", help="classification or regression")
parser.add_argument("--text", help="column of the text; recognised by its name when not given")
parser.add_argument("--label", help="column of the label")
parser.add_argument("--lora", type=int, default=0, help="rank of an adapter; 0 trains all weights")
parser.add_argument("--seeds", type=int, default=3, help="paired runs of the comparison")
parser.add_argument("--no-compare", action="store_true", help="do not train the same from scratch")
parser.add_argument(
    "--out", default="runs/example-finetune", help="run directory; the same command resumes it"
)
parser.add_argument("--tiny", action="store_true", help="a model of no use, in seconds")
args = parser.parse_args()

# A fifth is held out; the comparison chooses by one half of it and is scored on the other.
data = {"text": args.text, "label": args.label, "valid": 0.2}
print(pretrain.data(args.rows, args.task, args.checkpoint, **data))

clf = pretrain.finetune(  # prints its figures, and those of the comparison
    args.checkpoint,
    args.rows,
    args.task,
    lora=args.lora,
    compare=None if args.no_compare else "scratch",
    seeds=2 if args.tiny else args.seeds,
    out=args.out,
    limit="8 steps" if args.tiny else None,
    **data,
)
try:
    print(clf.confusion())
    print(clf.errors(3))
except DataError as error:  # a task without one class for each row
    print(error)
print("model", clf.save(f"{args.out}/model"))
print("report", clf.report())
