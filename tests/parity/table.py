"""Print the parity table as markdown: ``python tests/parity/table.py``."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from parity import test_vit
from parity.cases import CASES, batch_of, build_theirs, compare, open_ours


def main() -> None:
    """One line per family, head and variant: largest relative error of logits and gradients, fp32."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(
        f"Against transformers {transformers.__version__}, fp32, random weights, rows padded on the right.\n"
    )
    print("| family | head | variant | logits | gradients |\n|---|---|---|---|---|")
    worst = [0.0, 0.0]
    for case in (*CASES, *test_vit.CASES):
        with tempfile.TemporaryDirectory() as folder:
            theirs = build_theirs(case)
            theirs.save_pretrained(folder)
            ours, _ = open_ours(Path(folder))
            if case.family == "vit":
                logits, grads = test_vit.differences(theirs, ours, test_vit.pixels(case))
            else:
                logits, grads = compare(theirs, ours, batch_of(case))
        family, head, *variant = case.label.split("/")
        print(f"| {family} | {head} | {''.join(variant)} | {logits:.1e} | {grads:.1e} |")
        worst = [max(worst[0], logits), max(worst[1], grads)]
    print(f"\nLargest: logits {worst[0]:.1e}, gradients {worst[1]:.1e}.")


if __name__ == "__main__":
    main()
