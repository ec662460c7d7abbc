"""The command line: ``pretrain COMMAND``. Every command is one call of a public function.

The options of ``train`` and ``finetune`` are the fields of the sections of `RunConfig` and `TuneConfig`, checked by the
same code as the YAML. Heavy modules are imported only after the arguments have been parsed, so that help is instant.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pretrain.cli.arguments import (
    DEVICE,
    JSON,
    QUIET,
    READING,
    Option,
    checkpoint,
    interface,
    make_parser,
    read_settings,
    sampling,
    settings_class,
)
from pretrain.cli.chat import OPTIONS as CHAT
from pretrain.cli.chat import chat, show_pieces
from pretrain.cli.streams import open_streams, text_of
from pretrain.config.spelling import using
from pretrain.distributed.launched import launched, prints_error
from pretrain.distributed.slurm import OPTIONS as SLURM
from pretrain.errors import (
    ConfigError,
    Interrupted,
    PretrainError,
    did_you_mean,
    out_of_memory,
)
from pretrain.printing import coloured, columns, console, discard, printable, wrapped

__all__ = ["COMMANDS", "main"]

EXIT_BROKEN, EXIT_ERROR, EXIT_INTERRUPTED = 1, 2, 130
# Modules that take seconds to import, and whose C code swallows the exception of a signal or turns it into another.
_SWALLOWING = ("numpy", "torch")
_SAME_REQUEST = 0.25  # seconds within which signals are one request to end


@dataclass(frozen=True)
class Command:
    """One command: its help, its options, the function that runs it, and the options that the short help shows."""

    summary: str
    example: str
    options: tuple[Option, ...]
    run: Callable[[Any], int | None]
    common: str = ""


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a command like Ctrl-C, so that it cleans up; the same signal again ends it at once.

    Signals within `_SAME_REQUEST` seconds are one request, as when a terminal and a scheduler both send one: another
    exception would end the clean-up of the first.

    While one of `_SWALLOWING` is imported, nothing has begun that must be cleaned up, and all three end the process.
    Not under a launcher, which repeats its signals, and not for signals that are ignored, as by nohup.
    """
    before: dict[int, Any] = {}
    received: list[tuple[float, int]] = []

    def handle(number: int, frame: Any) -> None:
        specs = [getattr(sys.modules.get(name), "__spec__", None) for name in _SWALLOWING]
        if any(getattr(spec, "_initializing", False) for spec in specs):
            _complain("interrupted.", "")
            os._exit(128 + number)
        now = time.monotonic()
        if received and now - received[-1][0] < _SAME_REQUEST:
            return
        again = number in (one for _, one in received)
        received.append((now, number))
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        if again:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        raise Interrupted(128 + number)

    try:
        alone = not launched()
    except ConfigError:  # a command that reads it raises that again
        alone = False
    if alone and threading.current_thread() is threading.main_thread():
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            usual = (signal.SIG_DFL, signal.default_int_handler)
            if number is not None and signal.getsignal(number) in usual:
                before[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@_signals_raise()
def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0; 1 when `inspect` finds a broken checkpoint; 2 for an error in the input, which is printed as one paragraph
        (PRETRAIN_DEBUG=1 shows the traceback); 130 after Ctrl-C, 143 after SIGTERM and 129 after SIGHUP, once a
        training run has been saved and temporary files have been removed.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    open_streams()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _note
            code = _dispatch(arguments)
            sys.stdout.flush()
            return code
    except PretrainError as error:
        if os.environ.get("PRETRAIN_DEBUG") == "1":
            raise
        if prints_error(error):
            _complain(str(error))
        return EXIT_ERROR
    except KeyboardInterrupt as error:
        _complain(f"interrupted. {error}".rstrip(), "")
        return error.code if isinstance(error, Interrupted) else EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of standard output has exited, e.g. `| head`
        discard(sys.stdout)
        return 0
    except OSError as error:
        # Errors of files have been turned into PretrainErrors; one without a file name is of standard output.
        if os.environ.get("PRETRAIN_DEBUG") == "1" or error.filename is not None:
            raise
        discard(sys.stdout)  # the rest of its buffer would fail again when Python exits
        _complain(
            f"The output cannot be written: {error.strerror or error}. Make room there, or send it elsewhere."
        )
        return EXIT_ERROR
    except (MemoryError, RuntimeError) as error:
        if os.environ.get("PRETRAIN_DEBUG") == "1" or not out_of_memory(error):
            raise
        _complain(
            "There is not enough memory. Use fewer rows at a time (--batch_rows, --train.micro_rows), shorter texts "
            "or a smaller model."
        )
        return EXIT_ERROR


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if arguments[0] == "--version":
        from pretrain import __version__

        print(f"pretrain {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        near = did_you_mean(name.replace("_", "-"), COMMANDS)
        raise ConfigError(f"There is no command {name!r}.{near}")
    command = COMMANDS[name]
    parser = make_parser(
        name, command.summary, command.example, command.options, command.common.split()
    )
    options = rest[: rest.index("--")] if "--" in rest else rest
    if asked := [place for place, word in enumerate(options) if word in ("-h", "--help")]:
        print(parser.help(everything=options[asked[0] + 1 : asked[0] + 2] == ["all"]))
        return 0
    with using(interface(name, parser.takes_value)):
        args = parser.parse(rest)
        if (family := vars(args).pop("family", None)) is not None:
            from pretrain.models import own_family

            own_family(family)
        return command.run(args) or 0


def _overview() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = ["usage: pretrain COMMAND [options]", "", "Pre-train transformers, and use them.", ""]
    lines += [f"  {name:<{width}}{command.summary}" for name, command in COMMANDS.items()]
    lines += [
        "",
        "`pretrain COMMAND --help` shows its common options, `pretrain COMMAND --help all`",
        "all of them.",
    ]
    return "\n".join(lines)


def _complain(message: str, label: str = "error: ") -> None:
    """Print one paragraph on stderr; characters that could control the terminal are escaped."""
    screen = console()
    text = wrapped(f"{label}{printable(message, lines=True)}", columns(screen))
    if label and coloured(screen):
        head = label.rstrip()  # the blank after it may have become a line end
        text = f"\033[31m{head}\033[0m{text.removeprefix(head)}"
    print(text, file=screen, flush=True)


def _note(message: Warning | str, *place: Any, **options: Any) -> None:
    """Print a warning as one line, without its source location."""
    _complain(str(message), "note: ")


# --------------------------------------------------------------------------------------------- commands


_QUICKSTART: tuple[Option, ...] = (
    ("--out", str, "directory of the run", "runs/quickstart"),
    ("--minutes", float | None, "time limit of all steps together"),
    ("--seed", int, "seed", 0),
)


def _quickstart(args: Any) -> int:
    from pretrain.cli.quickstart import quickstart

    return int(quickstart(out=args.out, minutes=args.minutes, seed=args.seed)["exit_code"])


_PREPARE: tuple[Option, ...] = (
    ("sources", str, 'files, globs, folders, "hub:NAME", or "python"', None, {"nargs": "*"}),
    ("--config", str | None,
     "YAML file of pretrain train: prepare its data; of several, each replaces settings of those before it",
     None, {"action": "append"}),
    ("--out", str | None, "directory to write; by default the cache"),
    ("--tokenizer", str, "bpe, wordpiece, char, a path, or a name on the Hub (org/name)", "bpe"),
    ("--vocab_size", int, "size of the vocabulary to train", 8192),
    ("--row_length", int, "tokens in one row", 512),
    ("--valid", float | str, 'held-out fraction, source, or "last:0.1"', 0.01),
    ("--text", str | dict[str, str],
     "column of .jsonl, .csv, .tsv and .parquet files, or {file: column, ...}", "text"),
    ("--separator", str | None, "text that separates the documents of a file; by default a file is one"),
    ("--encoding", str | None, "encoding of text files; by default UTF-8"),
    ("--seed", int, "seed of the choice of held-out documents", 0),
    ("--workers", int | None, "processes; by default one per core"),
    ("--lowercase", None, "wordpiece only: ignore case and accents"),
    ("--keep_duplicates", None, "keep documents that occur again"),
    ("--source", str | None, "text or images; by default what the sources are"),
    ("--size", int | None, "of images: height and width; by default their own"),
    ("--channels", int | None, "of images: 3 or 1; by default those of each"),
    ("--quiet", None, "no progress bar and no table"),
)  # fmt: skip


def _prepare(args: Any) -> None:
    options = {k: v for k, v in vars(args).items() if k not in ("sources", "config")}
    if (args.config is None) == (not args.sources):
        raise ConfigError(
            "Name either sources to prepare, or a config that names them: --config FILE."
        )
    if args.config is not None:
        from pretrain.config import RunConfig
        from pretrain.training.run import open_data

        usual = vars(make_parser("prepare", "", "", _PREPARE).parse([]))
        quiet = options.pop("quiet")
        if changed := [name for name, value in options.items() if value != usual[name]]:
            raise ConfigError(
                f"--{changed[0]} has no effect with --config, which says how to prepare the data. Set it there, under "
                "data, or name the sources in place of the config."
            )
        settings = RunConfig.load(args.config)
        if settings.data.source is not None:
            raise ConfigError(
                f"{' '.join(args.config)} reads its rows by data.source ({settings.data.source}), so no text is to be "
                "prepared: train with it as it is. Images are prepared by pretrain prepare FOLDER --source images."
            )
        prepared = open_data(settings, quiet=quiet)
    else:
        from pretrain.data.prepare import prepare

        sources = args.sources if len(args.sources) > 1 else args.sources[0]
        prepared = prepare(sources, **options)
    print(printable(str(prepared.path)))


# The settings of the commands that have a run follow their options, see `make_parser`.
_TRAIN: tuple[Option, ...] = (
    ("--devices", int | str, "processes to start on this machine; auto is one for each GPU", 1),
)


def _train(args: Any) -> int:
    settings, options = _run_settings(args, _TRAIN)
    if settings is None:
        return 0
    from pretrain.training.run import train

    return int(train(settings, **options).exit_code)


def _run_settings(args: Any, own: tuple[Option, ...]) -> tuple[Any, dict[str, Any]]:
    """Return what `read_settings` does; None for the settings, too, if the sizes of the model were to be shown."""
    from pretrain.config import RunConfig

    settings, options = read_settings(RunConfig, args, own)
    if settings is not None and settings.model.size == "?":
        from pretrain.training.sizes import sizes

        print(printable(str(sizes(settings.model.family)), lines=True))
        return None, options
    return settings, options


_BENCH: tuple[Option, ...] = (("--steps", int, "steps to measure", 20), JSON)


def _bench(args: Any) -> None:
    settings, options = _run_settings(args, _BENCH)
    if settings is None:
        return
    from pretrain.training.bench import bench

    as_json = options.pop("json")
    found = bench(settings, **options)
    if as_json:
        _show(found.to_dict(), True)
    else:
        print(found)


_LR_RANGE: tuple[Option, ...] = (
    ("--lowest", float, "learning rate of the first step", 1e-6),
    ("--highest", float, "learning rate of the last step", 1.0),
    ("--steps", int, "number of steps", 100),
    ("--plot", str, "picture to write, .svg", "lr-range.svg"),
)


def _lr_range(args: Any) -> None:
    picture = vars(args).pop("plot")
    settings, options = _run_settings(args, _LR_RANGE)
    if settings is None:
        return
    from pretrain.training.lr_range import lr_range_test
    from pretrain.utils.curves import PICTURES
    from pretrain.utils.files import check_output

    check_output(Path(picture), PICTURES)
    found = lr_range_test(settings, **options)
    print(found.reason)
    if found.suggested:
        words = " ".join(f"--{key} {rate:g}" for key, rate in found.suggested.items())
        print(f"suggested: {words}", flush=True)
    print(f"picture: {printable(str(found.plot().save(picture)))}")


_FINETUNE: tuple[Option, ...] = (
    ("--compare", str | None, "scratch: also train the same model from random weights, and baselines"),
    ("--label_counts", list[int] | None,
     "numbers of training rows at which to compare, e.g. [50,200]; by default all rows"),
    ("--seeds", int, "paired seeds of the comparison", 5),
    *_TRAIN,
)  # fmt: skip


def _finetune(args: Any) -> int:
    from pretrain.finetuning.settings import TuneConfig

    settings, options = read_settings(TuneConfig, args, _FINETUNE)
    if settings is None:
        return 0
    from pretrain.finetuning import run

    return int(run.finetune(config=settings, **options).run.exit_code)


_DOCTOR: tuple[Option, ...] = (
    DEVICE,
    ("--out", str | None, "run directory that all processes must see"),
    ("--timeout", float, "seconds for each attempt to connect", 60.0),
    JSON,
)


def _doctor(args: Any) -> int:
    from pretrain.distributed.doctor import doctor

    return doctor(args.device, out=args.out, as_json=args.json, seconds=args.timeout)


def _slurm(args: Any) -> None:
    from pretrain.config import RunConfig
    from pretrain.distributed.slurm import is_task, script
    from pretrain.finetuning.settings import TuneConfig

    config, *more = args.config
    if more:
        command = "finetune" if any(map(is_task, args.config)) else "train"
        files = " ".join(f"--config {shlex.quote(file)}" for file in args.config)
        raise ConfigError(
            f"pretrain slurm writes a script for one file of settings, and --config names {len(args.config)}. Make "
            f"them one: pretrain {command} {files} --show_config > together.yaml"
        )
    (TuneConfig if is_task(config) else RunConfig).load(config)
    print(script(**vars(args) | {"config": config}), end="")


_PREDICT: tuple[Option, ...] = (
    *checkpoint(text="run or model directory"),
    ("file", str, "rows: .csv .tsv .jsonl .json .parquet .conll (also .gz)"),
    ("--out", str | None, ".jsonl, .csv or .tsv (also .gz, .zst), or .parquet; by default beside FILE"),
    ("--columns", dict[str, str], "column of each role, e.g. --columns.text review", {}),
    ("--task", str | None, "package.module:Class of the task, if it is your own"),
    ("--batch_rows", int, "examples in one forward pass", 64),
    ("--top_k", int | str | None,
     "number of likeliest classes to write with their probabilities, or all; by default the likeliest class, or those "
     "above the threshold"),
    ("--labels", list[str] | None,
     "classes of a model of images and texts, e.g. [cat,dog]; by default the vectors of the images"),
    ("--threshold", float | None, "smallest score of an object that a model of boxes finds; by default 0.3"),
    ("--template", str | None, "prompt with {} for the name of a class; by default This is a photo of {}."),
    DEVICE,
    *READING,
    QUIET,
)  # fmt: skip


def _predict(args: Any) -> None:
    from pretrain.inference.predict import predict_file

    options = vars(args)
    places = [options.pop(key) for key in ("checkpoint", "file", "out")]
    if (top_k := options.pop("top_k")) is not None:
        options["top_k"] = None if str(top_k).lower() in ("all", "none") else top_k
    for key in ("labels", "template", "threshold"):
        if options[key] is None:
            del options[key]
    out = predict_file(*places, progress=not options.pop("quiet"), **options)
    print(printable(str(out)))


_GENERATE: tuple[Option, ...] = (
    *checkpoint(),
    ("prompt", str, 'text to continue, or "-": one prompt per line of standard input'),
    *sampling(64),
    ("--chat", None, "answer the prompt as a turn of the user, through the chat template"),
    (
        "--stream",
        bool | None,
        "print the text as it is made; by default that of one prompt on a terminal",
    ),
)


def _generate(args: Any) -> None:
    from pretrain.checkpoint import load
    from pretrain.inference.chat import chat as answer_to
    from pretrain.inference.generate import generate

    options = {key: value for key, value in vars(args).items() if value is not None}
    prompts = _prompts(options.pop("prompt"))
    model = load(options.pop("checkpoint"))
    answer = answer_to if options.pop("chat") else generate
    if options.pop("stream", sys.stdout.isatty() and len(prompts) == 1):
        for prompt in prompts:
            show_pieces(answer(model, prompt, stream=True, **options))
        return
    texts = (
        generate(model, prompts, **options)
        if answer is generate
        else [answer_to(model, prompt, **options) for prompt in prompts]
    )
    for text in texts:
        print(printable(text, lines=True))


def _prompts(text: str) -> list[str]:
    if text != "-":
        return [text]
    lines = [text_of(line.rstrip("\r\n"), number) for number, line in enumerate(sys.stdin, 1)]
    if not any(lines):
        raise ConfigError("Standard input holds no prompt; write one per line.")
    return [line for line in lines if line]


_FILL_MASK: tuple[Option, ...] = (
    *checkpoint(),
    ("text", str, 'text with [MASK] in it, or "-": one per line of standard input'),
    ("--top_k", int, "candidates for each mask", 5),
)


def _fill_mask(args: Any) -> None:
    from pretrain.checkpoint import load
    from pretrain.inference.generate import fill_mask

    texts = _prompts(args.text)
    model = load(args.checkpoint)
    for text in texts:
        found = fill_mask(model, text, top_k=args.top_k)
        blocks = found if isinstance(found[0], list) else [found]
        for block in blocks:
            for item in block:
                print(f"{item['score']:.4f}  {item['token']!r:<16}  {printable(item['sequence'])}")


_TEXT_COLUMN: Option = (
    "--text", str | None, "column of the text; by default it is recognised by its name",
)  # fmt: skip
_EMBED: tuple[Option, ...] = (
    *checkpoint(text="run or model directory"),
    ("file", str, "lines (.txt), or rows: .csv .tsv .jsonl .json .parquet (also .gz)"),
    ("--out", str, "vectors: .npy, .parquet or .jsonl", ...),
    _TEXT_COLUMN,
    ("--normalize", bool | None, "scale vectors to length one; by default as the model's directory says"),
    ("--pooling", str | None, "mean, cls, lasttoken, max; by default as the directory says"),
    ("--prompt", str | None, "prefix of every text"),
    ("--prompt_name", str | None, "name of a prompt in the model's directory"),
    ("--batch_rows", int, "texts in one forward pass", 32),
    DEVICE,
    *READING,
    QUIET,
)  # fmt: skip


def _embed(args: Any) -> None:
    from pretrain.inference.text_files import embed_file

    options = vars(args)
    places = [options.pop(key) for key in ("checkpoint", "file", "out")]
    print(printable(str(embed_file(*places, progress=not options.pop("quiet"), **options))))


_SEARCH: tuple[Option, ...] = (
    *checkpoint(text="run or model directory"),
    ("query", str, "text to search for"),
    ("file", str, "texts: lines (.txt), or rows: .csv .tsv .jsonl .json .parquet"),
    _TEXT_COLUMN,
    ("--top_k", int, "number of texts to print", 10),
    ("--prompt_name", str | None, "name of the query's prompt in the model's directory"),
    DEVICE,
)


def _search(args: Any) -> None:
    from pretrain.inference.text_files import search_file

    for hit in search_file(**vars(args)):
        print(f"{hit.score:7.4f}  {hit.index + 1:>6}  {printable(str(hit.text))}")


_EVALUATE: tuple[Option, ...] = (
    *checkpoint(),
    ("--data", str | None,
     "labelled rows for a fine-tuned model, a prepared directory or text for a language model, or the "
     "package.module:FUNCTION that returns rows; by default the held-out rows of the run"),
    ("--columns", dict[str, str],
     "column of each role in labelled rows, e.g. --columns.label stars; by default as in the training rows", {}),
    ("--base", str | None, "the model before training, if the evaluation needs it and does not find it"),
    ("--task", str | None,
     "sts, retrieval or minimal-pairs, to measure these on --data; or package.module:Class of the task, if it is your "
     "own"),
    ("--objective", str | None, "package.module:Class of an objective of your own"),
    ("--separator", str | None, "text that separates the documents of a text file; by default that of the run"),
    ("--encoding", str | None,
     "encoding of the data, e.g. cp1252; by default that of the run, for text that is not UTF-8"),
    ("--batch_rows", int | None, "rows in one forward pass"),
    DEVICE,
    JSON,
)  # fmt: skip


def _evaluate(args: Any) -> None:
    from pretrain.evaluation import evaluate

    options = vars(args)
    as_json = options.pop("json")
    _show(evaluate(options.pop("checkpoint"), **options), as_json)


_PROBE: tuple[Option, ...] = (
    *checkpoint(),
    ("data", str, "labelled rows: a folder of images by class, .npz, or a table"),
    ("--test", float | str | None, "held-out rows, or their share; by default a fifth"),
    ("--valid", float | str | None, "rows to choose C on, or their share; by default a tenth"),
    ("--method", str, "linear, knn or means", "linear"),
    ("--shots", int | None, "labelled rows of each class in a draw; by default all"),
    ("--ways", int | None, "classes of a draw; by default all"),
    ("--draws", int, "number of draws of --shots or --ways", 5),
    ("--k", int, "neighbours that vote (knn)", 5),
    ("--columns", dict[str, str],
     "column of each role, e.g. --columns.label stars; by default they are recognised by name", {}),
    ("--pooling", str | None,
     "of images mean or first (the class token), of texts as for embed; by default as the classifier reads, of dinov2 "
     "the class token"),
    ("--batch_rows", int, "rows in one forward pass", 64),
    ("--seed", int, "seed of the split and the draws", 0),
    DEVICE,
    JSON,
)  # fmt: skip


def _probe(args: Any) -> None:
    from pretrain.config.strict_yaml import parse
    from pretrain.evaluation.probe import probe

    options = vars(args)
    as_json = options.pop("json")
    for name in ("labels", "names", "quoting"):  # which are no names of columns
        if name in (columns := options["columns"] or {}):
            columns[name], _ = parse(columns[name])
    _show(probe(options.pop("checkpoint"), options.pop("data"), **options), as_json)


_MERGE: tuple[Option, ...] = (
    *checkpoint("adapter", "directory of an adapter, or a run that trained one"),
    ("--out", str, "directory to write the whole model to", ...),
    ("--base", str | None, "base model; by default the one that the adapter names"),
)


def _merge(args: Any) -> None:
    from pretrain.lora import merge_to

    print(printable(str(merge_to(args.adapter, args.out, args.base))))


_PUSH: tuple[Option, ...] = (
    *checkpoint("directory", "run (its best checkpoint), checkpoint or model directory"),
    ("name", str, "repository on the Hub, org/name; created if it does not exist"),
    ("--private", None, "create the repository as a private one"),
    ("--message", str | None, "message of the commit"),
)


def _push(args: Any) -> None:
    from pretrain.checkpoint.upload import push

    private = True if args.private else None
    print(printable(push(args.directory, args.name, private=private, message=args.message)))


_EXPORT: tuple[Option, ...] = (
    *checkpoint("source", "run or model directory; an adapter is merged into its base"),
    ("--to", str, "hf, gguf, onnx or sentence-transformers", ...),
    ("--out", str | None, "new or empty directory; by default SOURCE-TO"),
    (
        "--dtype",
        str | None,
        "gguf only: numbers of the matrices, f32, f16, bf16 or q8_0; by default f16",
    ),
)


def _export(args: Any) -> None:
    from pretrain.exporting.run import export

    print(printable(str(export(**vars(args)))))


def _inspect(args: Any) -> int:
    from pretrain.checkpoint import inspect

    found = inspect(args.checkpoint)
    _show(found, args.json)
    return EXIT_BROKEN if found["manifest"].startswith("broken") or "problem" in found else 0


def _report(args: Any) -> None:
    from pretrain.report import fine_tuned, write

    if fine_tuned(args.run):
        from pretrain.finetuning.run import report

        print(printable(str(report(args.run))))
    else:
        print(printable(str(write(args.run))))


_SCHEMA: Option = (
    "command", Literal["train", "finetune"],
    "the command whose config file the schema describes: train or finetune", "train", {"nargs": "?"},
)  # fmt: skip


def _schema(args: Any) -> None:
    import json

    from pretrain.config.schema import schema

    print(json.dumps(schema(settings_class(args.command)), indent=2))


def _show(found: dict[str, Any], as_json: bool) -> None:
    """Print a flat mapping, aligned, or as JSON, with null for figures that do not exist.

    Characters that could control the terminal are escaped.
    """
    if as_json:
        import json

        from pretrain.utils.strict_json import without_nan

        print(json.dumps(without_nan(found), indent=2, default=str, allow_nan=False))
        return
    width = max(map(len, found), default=0) + 2
    for key, value in found.items():
        shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
        if isinstance(value, float):
            shown = f"{value:,.0f}" if key == "targets" else f"{value:.4f}"
        print(f"{key:<{width}}{printable(str(shown))}")


# The common settings of a run, in ``train``, ``lr-range`` and ``bench``.
_RUN = "--data --model --objective"
_ROWS = "--batch_rows --row_length --vocab_size"

COMMANDS = {
    "quickstart": Command(
        "No download: prepare, train and show a small model in a few minutes.",
        "pretrain quickstart",
        _QUICKSTART,
        _quickstart,
    ),
    "prepare": Command(
        "Turn text into a tokenizer and packed rows of tokens, or decode images once.",
        'pretrain prepare "books/*.txt" --out data/books --vocab_size 8192',
        _PREPARE,
        _prepare,
        "sources --out --tokenizer --vocab_size --row_length --valid --text --config --workers",
    ),
    "train": Command(
        "Train a model; the same command again resumes it.",
        "pretrain train --data text.txt --model gpt2:small --objective next-token",
        _TRAIN,
        _train,
        f"{_RUN} --out --limit --lr {_ROWS} --config --show_config --devices",
    ),
    "lr-range": Command(
        "Try rising learning rates on throwaway weights, and suggest one for `train`.",
        "pretrain lr-range --config configs/books-gpt.yaml --data.train data/books",
        _LR_RANGE,
        _lr_range,
        f"{_RUN} --lowest --highest --steps --plot {_ROWS} --config",
    ),
    "finetune": Command(
        "Fine-tune a checkpoint on labelled rows; the same command again resumes it.",
        "pretrain finetune --model runs/books-bert --task classification --data reviews.csv",
        _FINETUNE,
        _finetune,
        "--data --model --task --out --epochs --lr --batch_rows --lora --columns --valid --test --config --show_config "
        "--devices",
    ),
    "bench": Command(
        "Measure the speed of a config in a few steps, and say what limits it; nothing is kept.",
        "pretrain bench --config configs/gpt2-124m.yaml --parallel.compile true",
        _BENCH,
        _bench,
        f"{_RUN} --steps {_ROWS} --micro_rows --precision --compile --config --json",
    ),
    "doctor": Command(
        "Show what this machine has and what is wrong; under torchrun, test the connections.",
        "pretrain doctor --device cpu",
        _DOCTOR,
        _doctor,
    ),
    "slurm": Command(
        "Write a batch script that runs a config on several hosts.",
        "pretrain slurm --config configs/books-gpt.yaml --nodes 2 --out job.sbatch",
        SLURM,
        _slurm,
    ),
    "schema": Command(
        "Print the JSON schema of a config file, with which an editor completes and checks it.",
        "pretrain schema finetune > finetune.schema.json",
        (_SCHEMA,),
        _schema,
    ),
    "predict": Command(
        "Predict every row of a file with a fine-tuned model.",
        "pretrain predict runs/reviews new.csv --out answers.csv --columns.text review",
        _PREDICT,
        _predict,
        "checkpoint file --out --columns --top_k --batch_rows --device",
    ),
    "generate": Command(
        "Continue a text.",
        'pretrain generate runs/books-gpt "Once upon a time"',
        _GENERATE,
        _generate,
        "checkpoint prompt --max_new_tokens --temperature --top_k --top_p --stop --seed --chat",
    ),
    "chat": Command(
        "Talk to a model that was trained on conversations, in the terminal or in a browser.",
        "pretrain chat runs/chat --temperature 0.7",
        CHAT,
        chat,
        "checkpoint --system --web --port --max_new_tokens --temperature --top_k --top_p --seed",
    ),
    "fill-mask": Command(
        "Fill the masks of a text.",
        'pretrain fill-mask runs/books-bert "The [MASK] sailed."',
        _FILL_MASK,
        _fill_mask,
    ),
    "embed": Command(
        "Turn the texts of a file into vectors.",
        "pretrain embed runs/sentences notes.csv --text body --out notes.npy",
        _EMBED,
        _embed,
        "checkpoint file --out --text --pooling --normalize --prompt --batch_rows --device",
    ),
    "search": Command(
        "Print the texts of a file that are nearest to a query.",
        'pretrain search runs/sentences "a boat on the sea" notes.txt --top_k 5',
        _SEARCH,
        _search,
    ),
    "evaluate": Command(
        "Evaluate a checkpoint on the held-out rows of its run, or on other data.",
        "pretrain evaluate runs/reviews --data more.csv",
        _EVALUATE,
        _evaluate,
        "checkpoint --data --task --columns --batch_rows --device --json",
    ),
    "probe": Command(
        "Measure what the frozen features of a checkpoint tell about labelled rows.",
        "pretrain probe runs/photos-mae photos --method knn --shots 10",
        _PROBE,
        _probe,
        "checkpoint data --test --method --shots --ways --draws --k --pooling --columns --device --json",
    ),
    "merge": Command(
        "Merge an adapter into its base and write the whole model.",
        "pretrain merge runs/reviews-lora --out models/reviews",
        _MERGE,
        _merge,
    ),
    "push": Command(
        "Write a model and its card to the Hugging Face Hub, in one commit.",
        "pretrain push runs/reviews org/reviews --private",
        _PUSH,
        _push,
    ),
    "export": Command(
        "Write a model for another program: Hugging Face, llama.cpp, onnxruntime, sentence-transformers.",
        "pretrain export runs/books-gpt --to gguf --out models/books",
        _EXPORT,
        _export,
    ),
    "inspect": Command(
        "Show what a checkpoint contains and whether its files are intact.",
        "pretrain inspect runs/books-gpt --json",
        (*checkpoint(), JSON),
        _inspect,
    ),
    "report": Command(
        "Write report.html of a run: settings, curves, samples.",
        "pretrain report runs/books-gpt",
        (("run", str, "run directory"),),
        _report,
    ),
}
