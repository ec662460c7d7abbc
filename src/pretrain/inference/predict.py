"""Predictions of a fine-tuned model for a text, a pair of texts, rows of any source, and files of any length.

The task is the one recorded in the model's config.json, or, for a model of another library, the one of its head.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import pretrain.data
from pretrain.checkpoint import load
from pretrain.config.check import check_count
from pretrain.config.spelling import PREDICT, either, option, smaller_batch, using
from pretrain.data.labelled import choose_columns, field_names, roles_table
from pretrain.data.paths import path_from, tar_files
from pretrain.data.readers import COMPRESSIONS, TABLE_FORMATS, table_kind
from pretrain.data.row_writer import WRITABLE, RowWriter
from pretrain.data.tables import Chunk, Table, in_chunks, splits, stream_chunks
from pretrain.errors import ConfigError, DataError, ModelError, naming_memory
from pretrain.inference.columns import (
    columns_of,
    columns_read,
    columns_wanted,
    names_of_training,
    recorded_mapping,
    roles_known,
    roles_read,
)
from pretrain.objectives import build_objective, task_class
from pretrain.objectives.tasks import Task
from pretrain.printing import console, in_notebook
from pretrain.training.precision import choose_device
from pretrain.utils.files import check_output, muted, note
from pretrain.utils.memory_info import peak_memory

if TYPE_CHECKING:
    from pretrain.models.base import Model

__all__ = [
    "check_target",
    "opened_model",
    "predict",
    "predict_file",
    "predict_with",
    "rebuilt",
    "recorded_task",
    "row_bar",
    "task_of",
]

_BATCH_ROWS = 64
_CHUNK = 1024  # rows of a file in memory at a time


# ------------------------------------------------------------------------------------------------ the task


def task_of(model: Model) -> Task:
    """Return the task that a model was fine-tuned for.

    Args:
        model: a model of ``pretrain.load``, trained by this package or by another one. Its recorded task is untrusted
            input: only tasks of this package, and own ones that the caller has named, and options that they have are
            accepted.

    Raises:
        ModelError: the model makes no predictions (a language model, or a body without a head); the message names the
            method to use instead. Also if the recorded options do not fit the task.
        ConfigError: it was trained for a task that is not of this package, and the caller has not named its class.
    """
    name = recorded_task(model)
    if name is not None:
        return _build(model, name, recorded_mapping(model, "objective"))
    return _build(model, *_by_head(model))


def recorded_task(model: Model) -> str | None:
    """Return the name of the task in config.json, or None if there is none or the model lacks the head for it.

    Raises:
        ConfigError: the task is not of this package, and the caller has not named its class.
    """
    name = recorded_mapping(model, "objective").get("task")
    if not isinstance(name, str):
        return None
    kind = task_class(name, path_allowed=False).head_kind
    return name if kind in (None, model.head_kind) else None


def rebuilt(task: Task, model: Model) -> Task:
    """Return the same task with the same options for another model."""
    return _build(model, task.name, task.describe())


def _by_head(model: Model) -> tuple[str, dict[str, Any]]:
    kind, problem = model.head_kind, model.extra_config.get("problem_type")
    one_number = problem == "regression" or len(model.labels or ()) == 1
    if kind == "sequence-classification" and one_number:
        return "regression", {}
    if kind in ("sequence-classification", "image-classification", "audio-classification"):
        several = problem == "multi_label_classification"
        options = {"problem": "multi_label" if several else "single_label"}
        return kind.removeprefix("sequence-"), options
    if kind == "token-classification":
        return kind, {"word_blanks": None}  # other libraries train it on words with their blanks
    if kind in ("question-answering", "segmentation", "object-detection"):
        return kind, {}
    if kind is None and (own := model.backbone.default_task) is not None:
        return own, {}
    generate, chat, fill, embed = (
        either(f"pretrain {name}", f"model.{name.replace('-', '_')}(...)")
        for name in ("generate", "chat", "fill-mask", "embed")
    )
    use = {
        "causal-lm": f"it continues texts: {generate}, or {chat} if it was trained on conversations",
        "masked-lm": f"it fills masks: {fill}",
    }.get(str(kind), f"it gives vectors: {embed}")
    teach = either(
        "pretrain finetune --model CHECKPOINT --task classification --data FILE",
        'pretrain.finetune(model, data, task="classification")',
    )
    raise ModelError(
        f"This model has {f'the head {kind!r}' if kind else 'no head'} and no task to predict for; {use}. To teach it "
        f"one: {teach}."
    )


def _build(
    model: Model, name: str, options: Mapping[str, Any], own: type[Task] | None = None
) -> Task:
    cls = own or task_class(name, path_allowed=False)
    if cls.decode is Task.decode:
        raise ModelError(
            f"The task {name} has no method decode, so predict cannot return answers. Implement decode, or use another "
            "method of the model, such as generate."
        )
    known = cls.recorded_options(model)
    chosen = {key: value for key, value in options.items() if key in known}
    if model.fresh:
        note(
            f"{', '.join(sorted(model.fresh)[:3])} were not loaded from a file: unless they were trained since, the "
            "answers come from random weights"
        )
    try:
        built = build_objective(f"{cls.__module__}:{cls.__qualname__}", chosen, model)
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"config.json records options of the task {name} that it does not take: {error}. Repair the block "
            '"pretrain", or remove "objective" from it.'
        ) from error
    assert isinstance(built, Task)
    return built


# ------------------------------------------------------------------------------------------------ in memory


def predict(
    model: Model,
    inputs: Any,
    *,
    columns: Mapping[str, str] | None = None,
    task: str | type[Task] | None = None,
    batch_rows: int = _BATCH_ROWS,
    **options: Any,
) -> Any:
    """Return the prediction for one input, or for several.

    Args:
        model: a fine-tuned model; see `task_of`.
        inputs: a text, a pair of texts as a tuple, or a dict by role or column gives one prediction. A list of them,
            a dict of columns, a pandas frame, a ``datasets.Dataset`` or the ``Path`` of a file gives a list of
            predictions. For tasks over words a text is split at blanks, and a tuple holds the words of one text; for a
            chat it is what the user says.
            A ``str`` is always a text, never the name of a file; for a model of images or audio it is a path.
        columns: role -> column, for columns without a conventional name.
        task: class of the task that the model was trained for, or its import path, if it is your own.
        batch_rows: examples in one forward pass; it does not change the predictions.
        **options: options of the task's ``predict`` and ``decode``: ``max_new_tokens`` of a chat; ``top_k`` of a
            classifier, a number of classes or None for all, which gives lists of labels and their probabilities.

    Returns:
        A dict, or a list of dicts in the order of the inputs: ``label`` and ``score`` of a classifier; see
        ``decode`` of the task. An input without text gets an empty dict. A pandas frame gives a frame of predictions
        with its index.

    Raises:
        ModelError: the model makes no predictions.
        DataError: inputs of another kind, or without a column that the task needs.
        ConfigError: an option that the task does not have, or another task than that of the model.
    """
    own = _task_named(model, task)
    return predict_with(own, inputs, columns=columns, batch_rows=batch_rows, **options)


def _task_named(model: Model, named: str | type[Task] | None) -> Task:
    """Return the task of a model, see ``task_of``, which may be the caller's own class.

    A class without a name of its own is recorded by that of its base, so it answers in the place of the base.

    Raises:
        ConfigError: the caller has named another one, which would not change the answers.
    """
    wanted = None if named is None else task_class(named)
    task = task_of(model)
    if wanted is None:
        return task
    if wanted.name == task.name and issubclass(wanted, type(task)):
        return task if wanted is type(task) else _build(model, task.name, task.describe(), wanted)
    if not isinstance(task, wanted):
        raise ConfigError(
            f"The model answers by its task, {task.name}, and cannot by {wanted.name}. Leave {option('task')} out."
        )
    return task


@using(PREDICT)
def predict_with(
    task: Task,
    inputs: Any,
    *,
    columns: Mapping[str, str] | None = None,
    batch_rows: int = _BATCH_ROWS,
    **options: Any,
) -> Any:
    """Run `predict` with a task that has already been built."""
    check_count("batch_rows", batch_rows)
    table, single = _as_table(task, inputs, dict(columns or {}))
    if table is None:
        return []
    task.reset_counts()
    found = _answers(task, table, batch_rows, options)
    with naming_memory("predicting", lambda: smaller_batch(batch_rows)):
        answers = list(found)
    _say_unanswered(task, sum(map(_is_empty, answers)), len(answers))
    if single:
        return answers[0]
    is_frame = hasattr(inputs, "iloc") and hasattr(inputs, "columns")
    return _frame_of(inputs, answers) if is_frame else answers


def _frame_of(frame: Any, answers: Sequence[Mapping[str, Any]]) -> Any:
    """Return answers as a pandas frame with the index of the input; values that an answer lacks are missing."""
    names = list(dict.fromkeys(name for answer in answers for name in answer))
    columns = {name: [answer.get(name) for answer in answers] for name in names}
    return type(frame)(columns, index=frame.index)


def _answers(
    task: Task, table: Table, batch_rows: int, options: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    try:
        return task.predict(table, batch_rows, **options)
    except TypeError as error:
        raise ConfigError(f"The task {task.name} has no such option: {error}.") from error


def opened_model(checkpoint: Any, device: str, *, quiet: bool) -> Model:
    """Return the model of a directory, or a model as it is, on a device."""
    given = not isinstance(checkpoint, str | os.PathLike)
    model: Model = checkpoint if given else load(checkpoint, quiet=quiet)
    return model.to(choose_device(device))


def row_bar(progress: bool, total: int | None = None) -> Any:
    """Return a bar of rows, which only a terminal or a notebook shows."""
    from tqdm import tqdm

    quiet = not progress or not (console().isatty() or in_notebook())
    return tqdm(unit="row", disable=quiet, total=total, file=console())


def _is_empty(answer: Mapping[str, Any]) -> bool:
    return all(value is None for value in answer.values())


def _say_unanswered(task: Task, empty: int, count: int) -> None:
    """Print how many inputs have no answer, for what reasons, and how many were read in part."""
    if task.shortened and not task.beyond_chosen:
        note(
            f"{task.shortened:,} of {count:,} inputs exceed {task.max_length} tokens and are {task.beyond}"
        )
    if empty:
        reasons = +task.unanswered
        if (others := empty - reasons.total()) > 0:
            reasons["no text"] += others
        told = ", ".join(f"{reason} ({number:,})" for reason, number in reasons.most_common())
        note(f"{empty:,} of {count:,} inputs get no answer: {told}")


def _by_words(task: Task) -> bool:
    return roles_read(task)[0].name == "tokens"


def _is_turn(value: Any) -> bool:
    return isinstance(value, Mapping) and {"role", "content"} <= set(value)


def _as_table(task: Task, inputs: Any, columns: Mapping[str, str]) -> tuple[Table | None, bool]:
    """Return the inputs as a table by role (None if there are none), and whether they are a single input."""
    if (found := task.inputs(inputs)) is not None:
        for role in roles_known(task, {}):
            if role.constant and found[0] is not None and role.name not in found[0].columns:
                note(
                    f"the model was trained with {role.name} ({role.help}), which these inputs lack: give dicts with "
                    f"{roles_read(task)[0].name} and {role.name}"
                )
        return found
    if hasattr(inputs, "tolist") and not hasattr(inputs, "columns"):  # an array, or one column
        inputs = inputs.tolist()
    elif isinstance(inputs, Iterator):
        inputs = list(inputs)
    if _is_named(task, inputs, columns):
        inputs = inputs._asdict()
    single = False
    items: list[Any] | None = None
    if isinstance(inputs, list) and inputs and _is_turn(inputs[0]):  # one conversation
        inputs = {"messages": inputs}
    if isinstance(inputs, str) and task.reads_files:
        inputs = Path(inputs)
    if isinstance(inputs, str):
        _say_file_name(inputs)
        single, items = True, [inputs]
    elif isinstance(inputs, tuple) and _is_one(task, inputs):
        single, items = True, [inputs]
    elif isinstance(inputs, Mapping) and not splits(inputs) and not _are_columns(task, inputs):
        single, inputs = True, [inputs]
    elif isinstance(inputs, list | tuple):
        if not len(inputs):
            return None, False
        inputs = list(inputs)
        named = isinstance(inputs[0], Mapping) or _is_named(task, inputs[0], columns)
        items = None if named else inputs
    if items is not None:
        return _table_of(task, items), single
    table = task.read(inputs, name="inputs")
    if isinstance(inputs, Path) and (names := names_of_training(task, table, columns)) is not None:
        table = task.read(inputs, name="inputs", columns=names)
    table = task.gathered(table, columns)
    return roles_table(table, columns_read(task, table, columns, quiet=True)), single


def _is_named(task: Task, row: Any, columns: Mapping[str, str]) -> bool:
    """Return whether a value is a named tuple with fields for what the task reads; any other is a plain tuple."""
    if not hasattr(row, "_asdict"):
        return False
    fields = Table("inputs", {name: [] for name in row._fields})
    return bool(field_names(row, roles_known(task, columns), columns_wanted(task, fields, columns)))


def _say_file_name(text: str) -> None:
    if Path(text[-40:]).suffix.lower() in TABLE_FORMATS and not re.search(r"\s", text):
        note(f"{text[:80]!r} is read as a text; to read the file, give pathlib.Path({text[:80]!r})")


def _is_one(task: Task, values: tuple[Any, ...]) -> bool:
    """Return whether a tuple is one input: a pair of texts, or the words of one text."""
    if not values or not all(isinstance(value, str) for value in values):
        return False
    return _by_words(task) or (len(values) == 2 and len(roles_known(task, {})) > 1)


def _are_columns(task: Task, inputs: Mapping[Any, Any]) -> bool:
    """Return whether a mapping holds columns, not a single row."""
    values = [v.tolist() if hasattr(v, "tolist") else v for v in inputs.values()]
    listed = [isinstance(value, list | tuple) for value in values]
    if any(isinstance(v, list) and v and _is_turn(v[0]) for v in values):
        return False
    first = roles_read(task)[0]
    names = {first.name, *first.known, recorded_mapping(task.model, "columns").get(first.name)}
    if any(task.is_one(value) for key, value in inputs.items() if key in names):
        return False
    if any(key in names and _are_arrays(task, value) for key, value in inputs.items()):
        return True  # beside values that are no lists they are refused
    if _by_words(task):  # the words of a single row are already a list
        return any(
            isinstance(value, list | tuple) and value and isinstance(value[0], list | tuple)
            for value in values
        )
    return bool(values) and all(listed)


def _are_arrays(task: Task, value: Any) -> bool:
    """Return whether a value lists several whole images or recordings, and not the rows of an image."""
    listed = isinstance(value, list | tuple) and len(value) > 1
    if not listed or not all(hasattr(one, "dtype") and task.is_one(one) for one in value):
        return False
    alike = all(one.shape == value[0].shape for one in value)
    shape = (len(value), *value[0].shape)
    return not (alike and task.is_one(np.broadcast_to(np.zeros((), np.uint8), shape)))


def _table_of(task: Task, items: Sequence[Any]) -> Table:
    """Return texts, pairs or lists of words as a table by role.

    Raises:
        DataError: pairs and single texts are mixed, or the task needs more than a text.
    """
    roles = roles_known(task, {})
    if _by_words(task):
        rows = {roles[0].name: [list(w) if isinstance(w, tuple) else w for w in items]}
        return Table("inputs", rows, origin="the inputs", unit="index")
    pairs = [isinstance(item, list | tuple) and len(item) == 2 for item in items]
    needed = [role.name for role in roles if role.required]
    if any(pairs) and len(roles) > 1:
        if not all(pairs):
            raise DataError(
                f"Input {pairs.index(False) + 1} is no pair ({roles[0].name}, {roles[1].name}), but others are. Give "
                "all inputs in one form."
            )
        first, second = ([item[i] for item in items] for i in (0, 1))
        columns = {roles[0].name: first, roles[1].name: second}
    elif len(needed) > 1:
        raise DataError(
            f"The task {task.name} reads {' and '.join(needed)}: give pairs in this order, or dicts with these keys."
        )
    else:
        columns = {roles[0].name: list(items)}
    return Table("inputs", columns, origin="the inputs", unit="index")


# ------------------------------------------------------------------------------------------------ files


@using(PREDICT)
def predict_file(
    checkpoint: Any,
    file: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    batch_rows: int = _BATCH_ROWS,
    device: str = "auto",
    delimiter: str | None = None,
    quoting: bool | None = None,
    encoding: str | None = None,
    task: str | type[Task] | None = None,
    progress: bool = True,
    **options: Any,
) -> Path:
    """Write predictions for every row of a file to another file, in order; line-based files of any length are streamed.

    The columns of the input are kept, and those of the predictions added: ``predicted_label``, ``score``. A row without
    text keeps its position and has no prediction; the number of such rows is printed. Where several rows are one
    example (one box or one word in each), and for annotations of COCO and Pascal VOC, the file is read whole and the
    output has one row for each example, with boxes in the box format of the run. Columns are recognised in the first
    1,024 rows. Paths of images, masks and recordings are written relative to the output, as it is read again;
    absolute ones stay.

    Args:
        checkpoint: a run (its best checkpoint is used), a model directory, or a ``Model``.
        file: .csv .tsv .jsonl (read row by row), .json .parquet .conll (read whole), plain or compressed; for a model
            of images or audio also a folder of them, an image or a recording, or arrays (.npz).
        out: .jsonl, .csv or .tsv, plain, ``.gz`` or ``.zst``, or .parquet; next to the input when None. The file
            appears once it is complete. The first 4,096 rows fix the columns and types of a .parquet file; lists and
            objects are lists and structs, or JSON where their keys or types differ.
        columns: role -> column, for columns without a conventional name.
        batch_rows: examples in one forward pass.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"mps"``.
        delimiter: cell delimiter of .csv or .tsv; None: comma or tab, or as detected in the header.
        quoting: whether double quotes enclose cells of .csv or .tsv; None: see :func:`pretrain.data.tables.read_table`.
        encoding: encoding of a text file; None: UTF-8, or that of a byte order mark.
        task: see ``predict``.
        progress: show a progress bar in a terminal or notebook.
        **options: see ``predict``.

    Returns:
        Path of the output.

    Raises:
        DataError: a broken row (with its line), a missing column, predictions already in the file, an output that
            cannot be written.
        ModelError: the model makes no predictions.
        ConfigError: an option that the task does not have, or another task than that of the model.
        TrainingError: too little memory.
    """
    check_count("batch_rows", batch_rows)
    source = Path(file)
    form = {"delimiter": delimiter, "quoting": quoting, "encoding": encoding}
    chunks = _table_chunks(source, **form)  # an unreadable file raises before the model is loaded
    target = _target(source, out)
    model = opened_model(checkpoint, device, quiet=not progress)
    own = _task_named(model, task).to(model.device)
    chunks = _task_chunks(own, source, chunks, dict(columns or {}), form)
    first = next(chunks)
    chosen = columns_read(own, first.table, dict(columns or {}), quiet=not progress)
    files, count, empty = _file_columns(own, first.table, dict(columns or {})), 0, 0
    own.reset_counts()
    with (
        naming_memory("predicting", lambda: smaller_batch(batch_rows)),
        RowWriter(target, first.table.names) as output,
        row_bar(progress) as bar,
    ):
        for chunk in chain([first], chunks):
            table = roles_table(chunk.with_columns(chosen.values()), chosen)
            answers = _answers(own, table, batch_rows, options)
            for row, answer in zip(_rows_beside(target, chunk, files), answers, strict=True):
                output.write(row, answer)
                count, empty = count + 1, empty + _is_empty(answer)
                bar.update()
            if chunk is first and progress:
                # The tokens of a forward pass are bounded, so the first chunk shows the memory that all chunks need.
                note(f"memory about {peak_memory(model.device) / 2**30:.2f} GiB at the peak")
    _say_unanswered(own, empty, count)
    return target


def _task_chunks(
    task: Task,
    source: Path,
    chunks: Iterator[Chunk] | None,
    columns: Mapping[str, str],
    form: Mapping[str, Any],
) -> Iterator[Chunk]:
    """Return the rows as the task reads them: streamed, or whole where several rows may be one example."""
    if chunks is not None:
        first = next(chunks)
        if (names := names_of_training(task, first.table, columns)) is not None:
            form = {**form, "columns": names}
            chunks = stream_chunks(source, _CHUNK, **form)
            first = next(chunks)
        with muted():  # it is said for all rows below
            found = task.gathered(first.table, columns)
        if found is first.table or len(found) > len(first.table):  # rows of targets are no inputs
            return chain([first], chunks)
    table = task.gathered(task.read(source, name="data", **form), columns)
    return in_chunks(task.written(table), _CHUNK)


def _table_chunks(source: Path, **form: Any) -> Iterator[Chunk] | None:
    """Return the rows of a table in chunks, of which the first has been read.

    None for a folder, or a file of another kind such as an image or a JSON file that may hold annotations, which the
    task of the model reads; here it is only opened.

    Raises:
        DataError: the source cannot be opened, or the first rows cannot be read.
    """
    path = Path(os.path.expanduser(source))
    if table_kind(path) not in ("", "json") and not path.is_dir():
        chunks = stream_chunks(source, _CHUNK, **form)
        return chain([next(chunks)], chunks)
    for file in tar_files(path) if path.suffix.lower() == ".tar" else [path]:
        try:
            if file.is_dir():
                os.scandir(file).close()
            else:  # without waiting for a writer if it is a pipe
                os.close(os.open(file, os.O_RDONLY | os.O_NONBLOCK))
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror}.") from error
    return None


def _file_columns(task: Task, table: Table, given: Mapping[str, str]) -> set[str]:
    """Return the columns whose texts are paths, those of targets among them."""
    roles = {role.name: replace(role, required=False) for role in task.roles if role.file}
    wanted = {role: c for role, c in columns_of(task.model, table, given).items() if role in roles}
    return set(choose_columns(table, list(roles.values()), wanted, quiet=True).values())


def _rows_beside(target: Path, chunk: Chunk, files: Collection[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a chunk, in which paths of files hold for a table at ``target``; absolute ones stay.

    Args:
        target: the table that is written.
        chunk: the rows, which may hold items of files in any column.
        files: columns whose texts are paths, relative to the file that the rows were read from.
    """
    if not files:  # of a task that reads texts
        yield from chunk.rows
        return
    origin = Path(chunk.table.origin)
    folder = origin.parent if origin.is_file() else None
    for i, row in enumerate(chunk.rows):
        placed = dict(row)
        for name, column in chunk.table.columns.items():
            cell, text, base = column[i], row.get(name), folder if name in files else None
            if isinstance(cell, pretrain.data.images.FileItem):
                text, base = cell.source, Path()
            if base is None or not isinstance(text, str | Path) or not str(text).strip():
                continue
            if os.path.isabs(os.path.expanduser(text)):
                placed[name] = str(text)
            elif os.path.isfile(file := base / text):
                placed[name] = path_from(target.parent, file)
        yield placed


def _target(source: Path, out: str | os.PathLike[str] | None) -> Path:
    """Return the path of the output.

    Raises:
        ConfigError: the file ending is not supported.
        DataError: the path is the input itself or a directory, or lies in a directory that does not exist.
    """
    if out is None:
        stem, ending = source.name, table_kind(source)
        for suffix in reversed(source.suffixes[-2:]):
            if suffix.lower() in (*COMPRESSIONS, *TABLE_FORMATS):
                stem = stem.removesuffix(suffix)
        target = source.with_name(
            f"{stem}.predicted.{ending if ending in ('csv', 'tsv') else 'jsonl'}"
        )
    else:
        target = Path(os.path.expanduser(out))
    check_target(source, target, WRITABLE)
    return target


def check_target(source: Path, target: Path, endings: Sequence[str]) -> None:
    """Check before the work that a file of results can be written, as far as that can be known.

    Raises:
        ConfigError: the file ending is none of ``endings``.
        DataError: the path is the input itself or a directory, or lies in a directory that does not exist.
    """
    check_output(target, endings)
    if target.exists() and source.exists() and os.path.samefile(target, source):
        raise DataError(f"The output {target} is the input. Name another file.")
