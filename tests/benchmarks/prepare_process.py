"""The processes that the row of preparing compares, which import only what the compared libraries need."""

from __future__ import annotations

import json
import os

ROWS = 512  # tokens a row


def ours(source: str, tokenizer: str, out: str) -> None:
    """Prepare in this process; prints the tokens."""
    import pretrain

    prepared = pretrain.prepare(
        source, out, tokenizer=tokenizer, row_length=ROWS, workers=1, separator="\n", quiet=True,
        cache_dir=f"{out}-cache",
    )  # fmt: skip
    print(json.dumps(prepared.train.num_tokens + prepared.valid.num_tokens))


def theirs(source: str, tokenizer: str, out: str, batched: str) -> None:
    """Load lines, map the tokenizer, concatenate and cut, as the course of transformers does; prints the tokens."""
    os.environ["HF_HOME"] = f"{out}-hf"
    import datasets
    import tokenizers

    datasets.disable_progress_bars()
    backend = tokenizers.Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
    size = 1000 if batched == "default" else 10_000

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        # The fast call leaves out offsets, which nobody asks for here.
        call = backend.encode_batch if batched == "default" else backend.encode_batch_fast
        return {"input_ids": [e.ids for e in call(batch["text"])]}

    def group(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        flat = [index for ids in batch["input_ids"] for index in ids]
        return {"input_ids": [flat[k : k + ROWS] for k in range(0, len(flat), ROWS)]}

    data = datasets.load_dataset("text", data_files=source, split="train", cache_dir=f"{out}-hf")
    data = data.map(encode, batched=True, batch_size=size, remove_columns=["text"])
    data = data.map(group, batched=True, batch_size=size)
    print(json.dumps(sum(len(row) for row in data["input_ids"])))
