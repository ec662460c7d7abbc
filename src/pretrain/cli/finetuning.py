"""The commands ``finetune`` and ``predict``: their options and the functions that they call."""

from __future__ import annotations

from typing import Any

from pretrain.cli.arguments import add_checkpoint, add_settings, read_settings
from pretrain.printing import printable

__all__ = ["SHORT", "add_devices", "add_finetune", "add_predict", "finetune", "predict"]

# Short options for the settings that nearly every call gives.
SHORT = {"--model.checkpoint": "--model", "--data.train": "--data", "--task.name": "--task"}


def add_devices(parser: Any) -> None:
    """Declare ``--devices`` for ``train`` and ``finetune``."""
    parser.add_argument(
        "--devices",
        type=int | str,
        default=1,
        help="processes to start on this machine; auto is one for each GPU",
    )


def add_finetune(parser: Any) -> None:
    """Declare the options of ``pretrain finetune``."""
    from pretrain.finetuning.settings import TuneConfig

    add = parser.add_argument
    add("--compare", type=str | None, help="scratch: also train from random weights")
    add(
        "--label_counts",
        type=list[int] | None,
        help="numbers of training rows at which to compare, e.g. [50,200]; not given, all rows",
    )
    add("--seeds", type=int, default=5, help="paired seeds of the comparison")
    add_devices(parser)
    add_settings(parser, TuneConfig, SHORT)


def finetune(args: Any) -> int:
    """Fine-tune, and print the path of the report."""
    from pretrain.finetuning.settings import TuneConfig

    settings, options = read_settings(TuneConfig, args)
    if settings is None:
        return 0
    from pretrain.distributed.world import current_world
    from pretrain.finetuning import run

    result = run.finetune(config=settings, **options)
    if not result.run.exit_code and current_world().is_rank_zero:
        print(printable(str(result.report())))
    return int(result.run.exit_code)


def add_predict(parser: Any) -> None:
    """Declare the options of ``pretrain predict``."""
    add = parser.add_argument
    add_checkpoint(parser, text="run or model directory")
    add("file", type=str, help="rows: .csv .tsv .jsonl .json .parquet .conll (also .gz)")
    add("--out", type=str | None, help=".jsonl, .csv or .tsv; not given, beside FILE")
    add(
        "--columns",
        type=dict[str, str],
        default={},
        help="role: column, e.g. --columns.text review",
    )
    add("--batch_rows", type=int, default=64, help="examples in one forward pass")
    add(
        "--top_k",
        type=int | str | None,
        help="of a classifier the likeliest K classes with their probabilities, or all; not given, the likeliest "
        "class, or those above the threshold",
    )
    add("--device", type=str, default="auto", help="auto, cpu, cuda or mps")
    add(
        "--delimiter",
        type=str | None,
        help="between the cells of .csv or .tsv; not given, comma or tab, or what the header shows",
    )
    add(
        "--quoting",
        type=bool | None,
        help="whether double quotes enclose cells of .csv or .tsv; not given, in .csv they do",
    )
    add(
        "--encoding",
        type=str | None,
        help="of the file, e.g. cp1252; not given, UTF-8",
    )
    add("--quiet", action="store_true", help="no progress bar")


def predict(args: Any) -> None:
    """Predict the rows of a file, and print the path of the predictions."""
    from pretrain.inference.predict import predict_file

    options = vars(args)
    places = [options.pop(key) for key in ("checkpoint", "file", "out")]
    if (top_k := options.pop("top_k")) is not None:
        options["top_k"] = None if top_k == "all" else top_k
    out = predict_file(*places, progress=not options.pop("quiet"), **options)
    print(printable(str(out)))
