"""Print the parity table as markdown: ``python tests/parity/table.py``."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from parity import (
    test_audio_spectrogram_transformer,
    test_clip,
    test_dinov2,
    test_image_towers,
    test_resnet,
    test_siglip,
    test_vit,
    test_vit_mae,
)
from parity.cases import CASES, Case, batch_of, build_theirs, compare, open_ours
from pretrain.objectives.contrastive import Contrastive, SigmoidContrastive


def errors(case: Case, folder: Path) -> tuple[float, float]:
    """Largest relative error of the outputs, and of the gradients."""
    theirs = build_theirs(case)
    theirs.save_pretrained(folder)
    ours, _ = open_ours(folder)
    if case.head == "image-classification" and case.family in test_image_towers.NAMES:
        return test_image_towers.differences(theirs, ours)
    match case.family:
        case "vit":
            return test_vit.differences(theirs, ours, test_vit.pixels(case))
        case "dinov2" | "dinov2_with_registers":
            return test_dinov2.differences(theirs, ours, test_dinov2.pixels(case))
        case "vit_mae":
            return test_vit_mae.differences(theirs, ours)
        case test_audio_spectrogram_transformer.FAMILY:
            return test_audio_spectrogram_transformer.differences(theirs, ours)
        case "resnet":
            return test_resnet.differences(theirs, ours)
        case "clip":
            batch = test_clip.batch_of("gelu")
            return test_clip.differences(theirs, ours, Contrastive, batch)
        case "siglip":
            return test_clip.differences(theirs, ours, SigmoidContrastive, test_siglip.batch_of(14))
        case _:
            return compare(theirs, ours, batch_of(case))


def main() -> None:
    """One line per family, head and variant: largest relative error of outputs and gradients, fp32."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(
        f"Against transformers {transformers.__version__}, fp32, random weights, rows padded on the right.\n"
    )
    print("| family | head | variant | outputs | gradients |\n|---|---|---|---|---|")
    worst = [0.0, 0.0]
    resnets = zip(test_resnet.KINDS, test_resnet.CASES, strict=True)
    images = [
        *test_vit.CASES,
        *test_dinov2.CASES,
        *test_vit_mae.CASES,
        *test_audio_spectrogram_transformer.CASES,
        *(replace(case, label=f"{case.label}/{kind}") for kind, case in resnets),
        test_clip.case_of("gelu"),
        Case("siglip/none", "Siglip", "SiglipModel", test_siglip.SIZES),
        *map(test_image_towers.case_of, test_image_towers.NAMES),
    ]
    for case in (*CASES, *images):
        with tempfile.TemporaryDirectory() as folder:
            outputs, grads = errors(case, Path(folder))
        family, head, *variant = case.label.split("/")
        print(f"| {family} | {head} | {''.join(variant)} | {outputs:.1e} | {grads:.1e} |")
        worst = [max(worst[0], outputs), max(worst[1], grads)]
    print(f"\nLargest: outputs {worst[0]:.1e}, gradients {worst[1]:.1e}.")


if __name__ == "__main__":
    main()
