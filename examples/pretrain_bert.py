"""Pre-train a BERT-like model on your own text, fill masks with it, and turn sentences into vectors.

python examples/pretrain_bert.py                         # the built-in corpus, ten minutes
python examples/pretrain_bert.py "books/*.txt" --minutes 60 --family modernbert
python examples/pretrain_bert.py --tiny                  # seconds; what the tests run
"""

from __future__ import annotations

import argparse

import pretrain

parser = argparse.ArgumentParser(description="Pre-train a BERT-like model.")
parser.add_argument(
    "source", nargs="?", default="python", help="file, glob, folder, or the built-in corpus"
)
parser.add_argument(
    "--out", default="runs/example-bert", help="run directory; the same command again resumes it"
)
parser.add_argument("--family", default="modernbert", help="bert, roberta or modernbert")
parser.add_argument("--size", default="mini", help="tiny, mini, small, base, ...")
parser.add_argument("--minutes", type=float, default=10.0, help="time for training")
parser.add_argument("--tiny", action="store_true", help="a model of no use, in seconds")
args = parser.parse_args()

data = pretrain.prepare(
    args.source,
    tokenizer="wordpiece",
    vocab_size=300 if args.tiny else 8192,
    row_length=64 if args.tiny else 256,
    valid=0.1 if args.tiny else 0.01,
)

run = pretrain.train(
    {
        "data": {"train": str(data.path)},
        "model": {"family": args.family, "size": "tiny" if args.tiny else args.size},
        # Three tokens in ten are hidden, whole words at a time; the held-out rows always get the same masks.
        "objective": {"class_path": "MaskedLM", "init_args": {"rate": 0.3, "whole_word": True}},
        "optim": {"lr": 1e-3, "schedule": "wsd", "warmup": 0.06},
        "train": {
            "out": args.out,
            "limit": "8 steps" if args.tiny else f"{args.minutes} minutes",
            "batch_rows": 4 if args.tiny else 64,
            "eval_rows": 4 if args.tiny else 0,
        },
    }
)
print(run)

model = pretrain.load(run.path)
for guess in model.fill_mask("import [MASK]", top_k=3):
    print(f"{guess['score']:.3f}  {guess['sequence']}")
vectors = model.embed(["a list of numbers", "a sequence of integers", "the sea"])  # (3, D)
print("vectors", tuple(vectors.shape))
