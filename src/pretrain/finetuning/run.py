"""Entry point of fine-tuning: train a checkpoint on labelled rows for a task, with the trainer of pre-training.

``finetune`` is called from notebooks and by the command line. The same call resumes a run: everything it builds is a
function of its settings and rows, and the trainer continues from the newest checkpoint in the output directory.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain import finetuning, training
from pretrain.checkpoint import load
from pretrain.checkpoint.best import COMPARISON
from pretrain.config.run import naming_paths
from pretrain.config.spelling import FINETUNE, either, using
from pretrain.distributed.launched import count_devices
from pretrain.distributed.world import current_world
from pretrain.errors import ConfigError, DataError
from pretrain.finetuning.card import example_call
from pretrain.finetuning.job import Job
from pretrain.finetuning.keywords import from_keywords
from pretrain.finetuning.page import render
from pretrain.finetuning.settings import TuneConfig, check_idle, from_memory
from pretrain.finetuning.trials import kept_comparison
from pretrain.objectives import task_class
from pretrain.objectives.tasks import Task
from pretrain.report.run_report import PAGE
from pretrain.training.closing import reported, time_and_units
from pretrain.training.resuming import has_begun
from pretrain.training.state import isolated_torch_state
from pretrain.utils.files import muted, note
from pretrain.utils.html import write_page

if TYPE_CHECKING:
    from pretrain.finetuning.result import Finetuned
    from pretrain.training.trainer import Hook

__all__ = ["finetune", "report"]

_ANEW = "<!-- made from a checkpoint, not at the end of the run -->"


@using(FINETUNE)
@isolated_torch_state()
def finetune(
    model: Any = None,
    data: Any = None,
    task: str | None = None,
    *,
    config: str | os.PathLike[str] | Mapping[str, Any] | TuneConfig | None = None,
    valid: Any = None,
    test: Any = None,
    out: str | os.PathLike[str] | None = None,
    compare: str | None = None,
    label_counts: Sequence[int] | None = None,
    seeds: int = 5,
    devices: int | str = 1,
    hooks: Sequence[Hook | Callable[[Mapping[str, Any]], None]] = (),
    quiet: bool = False,
    **keywords: Any,
) -> Finetuned:
    """Fine-tune a checkpoint on labelled rows, or resume where an earlier call stopped.

    Args:
        model: a run, a checkpoint, any Hugging Face directory of a known family, a model of the Hub (``"org/name"``),
            or a ``Model``.
        data: training rows: a file (.csv .tsv .jsonl .json .parquet .conll), a list of dicts, a pandas frame or a
            ``datasets.Dataset``.
        task: ``classification``, ``regression``, ``token-classification``, ``question-answering``, ``chat``,
            ``language-modelling``, ``embedding``, ``preference``, ``image-classification``, ``segmentation``,
            ``object-detection``, or the import path of a custom task.
        config: a YAML file or a mapping of sections with further settings.
        valid: held-out rows, or the fraction of the rows that is held out (a tenth, stratified by class).
        test: test rows, which are evaluated once, at the end.
        out: directory of the run; by default one under ``runs/`` named by task and fingerprint, so that the same
            call finds its result again.
        compare: ``"scratch"`` also trains the same architecture from random weights, with the same rows, budget and
            seeds, and classical baselines, and reports whether pre-training helped.
        label_counts: numbers of training rows at which to compare; all of them when None.
        seeds: number of paired seeds of the comparison.
        devices: number of processes to start on this machine, also from a notebook; ``"auto"`` is one for each GPU.
            Model and rows must then be files.
        hooks: called after steps with a read-only record.
        quiet: print nothing.
        **keywords: columns by role (``text="review", label="stars"``), options of the task
            (``class_weights="balanced"``), or settings of any section (``lora=16, lr=3e-5, epochs=4``).

    Returns:
        The trained model with its metrics; see ``Finetuned``. The weights are those of the best evaluation. The model
        card and the page ``report.html`` are in the directory of the run.

    Raises:
        PretrainError: a setting, the rows or the checkpoint cannot be used; the message says what to do.
    """
    if data is not None and (section := keywords.pop("train", None)) is not None:
        named = {"valid": valid, "test": test, "out": out}
        given = {*keywords, *(name for name, value in named.items() if value is not None)}
        keywords |= section_beside_rows(section, given)
    arguments = {"train": data, "valid": valid, "test": test, "out": out, **keywords}
    settings, objects = from_keywords(config, model, task, arguments)
    if compare is not None:
        finetuning.check_comparison(compare, settings, label_counts, seeds)
    quiet = quiet or not current_world().is_rank_zero
    if devices != 1:
        check_devices(model, objects, compare)
        count_devices(devices, settings.parallel.device)
    with muted(quiet):
        job = Job.open(model, settings, objects, quiet=quiet)
        if not has_begun(Path(settings.train.out)):
            check_idle(job.settings, job.data.learned.options.get("problem"))
        if devices != 1:
            run = training.on_devices("finetune", job.settings, devices, hooks=hooks, quiet=quiet)
            if run is not None:  # those processes have written the report and the last words
                return job.read_back(run)
        with job.alone():
            # The comparison comes first, because the run uses the learning rate that it chooses.
            comparison = (
                None if compare is None else finetuning.compare_arms(job, label_counts, seeds)
            )
            result = job.train(hooks)
        result.comparison = comparison or kept_comparison(job)
        for line in current_world().broadcast_result(lambda: closing_lines(result)):
            note(line)
    return result


def section_beside_rows(train: Any, given: Collection[str]) -> dict[str, Any]:
    """Return the settings of the section ``train``, which is given beside rows that have the same name.

    Args:
        train: the section.
        given: names of the settings that are given without their section.

    Raises:
        ConfigError: it is no section but other rows, or a setting is given twice.
    """
    plain = (str, int, float, os.PathLike)
    is_section = isinstance(train, Mapping) and all(
        value is None or isinstance(value, plain) or name == "loggers"
        for name, value in train.items()
    )
    if not is_section:
        raise ConfigError(
            f"The training rows are given twice, by the second argument, data, and by train (a "
            f"{type(train).__name__}). Leave one out; settings of the section train are train={{'epochs': 4}}, or "
            "epochs=4."
        )
    if twice := sorted(train.keys() & given):
        raise ConfigError(f"{twice[0]} is given twice, also in train={{...}}. Leave one out.")
    return dict(train)


def check_devices(model: Any, objects: Mapping[str, Any], compare: str | None) -> None:
    """Check that other processes can run the job: they read files and cannot access the memory of this one.

    Raises:
        ConfigError: model or rows are objects in memory, or a comparison is requested.
    """
    tail = "or leave devices out."
    if model is not None and not isinstance(model, str | os.PathLike):
        raise ConfigError(
            f"devices starts other processes, which cannot see a {type(model).__name__} of this one. Save it and "
            f"name its directory, {tail}"
        )
    if objects:
        rows = ", ".join(f"{name} (a {type(value).__name__})" for name, value in objects.items())
        raise ConfigError(
            f"devices starts other processes, which cannot see rows in the memory of this one: {rows}. Write them to "
            f"a file (.jsonl, .csv, .parquet) and name it, {tail}"
        )
    if compare is not None:
        raise ConfigError(
            f"compare trains many small models one after the other, each on one device: leave it out, {tail}"
        )


def closing_lines(result: Finetuned) -> list[str]:
    """Write the report of a run that has come to its end, and return the lines that are printed then."""
    comparison = result.comparison
    return [
        *repr(result).splitlines(),
        time_and_units(result.run),
        *(comparison.table().splitlines() if comparison is not None else []),
        *(reported(result.report) if not result.run.exit_code else []),
        *follow_up(result),
    ]


def follow_up(result: Finetuned) -> list[str]:
    """Return what can be done with the model, in the spelling of the interface in use."""
    path, task, kind = str(result.path), result.task.name, result.model.head_kind
    shell_path = shlex.quote(path)
    call = example_call(result)
    ways = [(f"pretrain predict {shell_path} FILE", call)]
    if task in ("chat", "preference"):
        ways = [
            (f"pretrain chat {shell_path}", call),
            (f'pretrain generate {shell_path} "Hello" --chat', ""),
        ]
    elif task == "language-modelling":
        name = "generate" if kind == "causal-lm" else "fill-mask"
        ways = [(f"pretrain {name} {shell_path} TEXT", call)]
    elif task == "embedding":
        ways = [(f"pretrain embed {shell_path} FILE --out vectors.npy", call)]
    adapter = result.model.adapter
    in_memory = adapter is not None and adapter.base is None
    opened = f"{path!r}{', base=DIR' * in_memory}"
    lines = [either(way, f"pretrain.load({opened}).{call}" if call else "") for way, call in ways]
    lines.append(
        either(
            f"pretrain evaluate {shell_path} --data FILE",
            f"pretrain.evaluate({path!r}, ROWS{', base=DIR' * in_memory})",
        )
    )
    if in_memory:
        lines.insert(0, "model.save(DIR)  # what the adapter was trained on lies in no directory")
    return ["next:", *(f"    {line}" for line in lines if line)]


def report(run_dir: str | os.PathLike[str]) -> Path:
    """Return the page of a fine-tuning run, which is written when the run ends.

    Until then it is made from the rows and the best checkpoint, each time anew; nothing else in the directory is
    changed.

    Raises:
        DataError: the rows were objects in memory, or have changed since the run; or the model before training was one,
            and the run trained an adapter of it or compares with it.
        PretrainError: there is no such run, or its rows or its checkpoint cannot be read.
    """
    folder = Path(run_dir)
    page = folder / PAGE
    if page.is_file() and not page.read_text(encoding="utf-8", errors="replace").endswith(_ANEW):
        return page
    settings, run = TuneConfig.of_run(folder), training.read_run(folder)
    settings.train.out = str(folder)
    sources = (settings.data.train, settings.data.valid, settings.data.test)
    start, best = None, run.best or run.checkpoint
    gone = any(map(from_memory, sources))
    if not gone and from_memory(settings.model.checkpoint):
        # The best checkpoint has all that a page shows, but for an adapter, or where it is compared with the start.
        compares = task_class(settings.task.name).prepare_reference is not Task.prepare_reference
        gone = bool(settings.method.lora) or compares or (folder / COMPARISON).exists()
        start = None if gone or best is None else load(best, quiet=True)
    if gone:
        raise DataError(
            f"The rows of {folder}, or a model that its page needs, were objects in memory, so it can be written only "
            "where they are: call finetune again with them and the same out, which trains no further."
        )
    with muted(), naming_paths(folder, settings):
        job = Job.open(start, settings, {}, quiet=True)
        result = job.read_back(run, write=False)
    if result.model.extra_config["pretrain"].get("fingerprint") != result.fingerprint:
        raise DataError(
            f"The rows of {', '.join(dict.fromkeys(job.data.names.values()))} are not those of {folder}: a file has "
            "changed since, so its page cannot be made again. Restore the file."
        )
    return write_page(page, render(result) + _ANEW)
