"""Pre-train a GPT-like model on your own text and let it write.

python examples/pretrain_gpt.py                          # the built-in corpus, ten minutes
python examples/pretrain_gpt.py "books/*.txt" --minutes 60 --size small
python examples/pretrain_gpt.py --tiny                   # seconds; what the tests run
"""

from __future__ import annotations

import argparse

import pretrain

parser = argparse.ArgumentParser(description="Pre-train a GPT-like model.")
parser.add_argument(
    "source", nargs="?", default="python", help="file, glob, folder, or the built-in corpus"
)
parser.add_argument(
    "--out", default="runs/example-gpt", help="run directory; the same command again resumes it"
)
parser.add_argument("--size", default="mini", help="tiny, mini, small, base, ...")
parser.add_argument("--minutes", type=float, default=10.0, help="time for training")
parser.add_argument("--prompt", default="def", help="what the model shall continue")
parser.add_argument("--tiny", action="store_true", help="a model of no use, in seconds")
args = parser.parse_args()

# 1. Text -> tokenizer and packed rows. Kept by content: the second call costs nothing.
data = pretrain.prepare(
    args.source,
    vocab_size=300 if args.tiny else 8192,
    row_length=64 if args.tiny else 512,
    valid=0.1 if args.tiny else 0.01,
)

# 2. Rows -> a trained model. Every setting has a default; these are the ones worth knowing.
run = pretrain.train(
    {
        "data": {"train": str(data.path)},
        "model": {"family": "qwen3", "size": "tiny" if args.tiny else args.size},
        "objective": {"class_path": "NextToken"},
        "optim": {"name": "muon", "lr": 3e-3, "schedule": "wsd"},
        "train": {
            "out": args.out,
            "limit": "8 steps" if args.tiny else f"{args.minutes} minutes",
            "batch_rows": 4 if args.tiny else 32,
            "eval_rows": 4 if args.tiny else 0,
            "sample": args.prompt,
        },
    }
)
print(run)

# 3. The checkpoint is a Hugging Face directory; this opens the best one of the run.
model = pretrain.load(run.path)
print(model.generate(args.prompt, max_new_tokens=40, temperature=0.8, top_k=50, seed=0))
