"""The errors that bad input can cause.

Every message says what happened, where (file, row, tensor), the likely cause and the fix. Any other exception that
the package raises is a bug in the package.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterable, Iterator

from pretrain.printing import printable

__all__ = [
    "AdapterFound",
    "CheckpointCorrupt",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DistributedError",
    "Interrupted",
    "ModelError",
    "NoTargets",
    "PretrainError",
    "RunLocked",
    "TokenizerError",
    "TrainingError",
    "did_you_mean",
    "named_error",
    "naming_memory",
    "nearest",
    "out_of_memory",
    "suggestion",
]


_START = 3  # letters by which a name is known to begin as another
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


class PretrainError(Exception):
    """Base of every error that a user's input can cause.

    Attributes:
        everywhere: all processes of a run raise it, so that only one of them needs to print it.
    """

    everywhere = False

    def __str__(self) -> str:
        # A message may quote text with control characters, which must not reach a terminal, also not in a traceback.
        return printable(super().__str__(), lines=True)


class ConfigError(PretrainError):
    """A setting is unknown, of the wrong type or impossible."""


class DataError(PretrainError):
    """A source, a prepared directory or a row cannot be used."""


class NoTargets(DataError):
    """The rows have nothing to predict."""


class TokenizerError(PretrainError):
    """A tokenizer file is broken or does not fit what it is used with."""


class ModelError(PretrainError):
    """A model does not support what is requested (a missing head, too many positions)."""


class CheckpointError(PretrainError):
    """A checkpoint directory cannot be written or read."""


class CheckpointCorrupt(CheckpointError):
    """A file of a checkpoint does not match its manifest or its format.

    Args:
        file: the file that differs.
        expected: the value that the manifest or the format requires.
        found: the value on disk.
        hint: a further sentence, e.g. the remedy.
    """

    def __init__(self, file: object, expected: object, found: object, hint: str = "") -> None:
        self.file, self.expected, self.found = str(file), str(expected), str(found)
        text = f"{self.file} is damaged: expected {self.expected}, found {self.found}."
        super().__init__(f"{text} {hint}".strip())


class AdapterFound(CheckpointError):
    """A directory holds an adapter, but the caller needs a whole model, which it can read in parts."""


class RunLocked(CheckpointError):
    """Another process is writing into the same run directory.

    Args:
        pid: id of the process that holds the lock (0: not known).
        host: its host.
        since: when it took the lock, ISO 8601 in UTC.
        run_dir: the directory.
    """

    def __init__(self, pid: int, host: str, since: str, run_dir: object = "this directory") -> None:
        self.pid, self.host, self.since = pid, host, since
        holder = f"process {pid}" if pid else "a process"
        super().__init__(
            f"{run_dir} is in use by {holder} on {host} since {since}. Two runs in one directory would "
            f"overwrite each other: wait for it, stop it, or choose another output directory."
        )


class TrainingError(PretrainError):
    """Training cannot start or cannot continue."""


class DistributedError(PretrainError):
    """The processes of a run cannot connect, do not match each other, or have lost one of them."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the command to end.

    Args:
        code: exit code, 128 plus the number of the signal.
        text: what has been done by then, as one sentence; may be empty.
    """

    def __init__(self, code: int, text: str = "") -> None:
        self.code = code
        super().__init__(*[text] * bool(text))


def named_error(name: str, text: str) -> PretrainError:
    """Rebuild an error of another process from the name of its class and its text.

    Returns:
        An error of that class, or of its nearest base class that takes only a text. A name that is not a
        ``PretrainError`` becomes a ``DistributedError`` whose message holds the name.
    """
    kind = globals().get(name)
    if not (isinstance(kind, type) and issubclass(kind, PretrainError)):
        return DistributedError(f"{name}: {text}")
    plain = next(base for base in kind.__mro__ if "__init__" not in vars(base))
    error: PretrainError = plain(text)
    return error


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error of Python, NumPy or torch means that a host or a device is out of memory."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(words in text for words in _NO_MEMORY)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that ``name`` was likely meant to be, or None: none is better than an unlike one.

    That is a name that differs in few letters, else one that begins as the other, else one of mostly the same letters.
    """
    options = list(known)
    starts = [
        option
        for option in options
        if min(len(option), len(name)) >= _START
        and (option.startswith(name) or name.startswith(option))
    ]
    for candidates, cutoff in ((options, 0.8), (starts, 0.0), (options, 0.65)):
        if near := difflib.get_close_matches(name, candidates, n=1, cutoff=cutoff):
            return near[0]
    return None


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the nearest known name, or "" if none is near."""
    near = nearest(name, known)
    return "" if near is None else f" Did you mean {near!r}?"


def did_you_mean(name: str, known: Iterable[str], others: Iterable[str] = ()) -> str:
    """Return ``" Did you mean 'x'?"`` for the nearest known name or other name, else the list of known names."""
    options = sorted(str(item) for item in known)
    if near := suggestion(name, [*options, *others]):
        return near
    return f" Known: {', '.join(options)}." if options else ""


@contextlib.contextmanager
def naming_memory(what: str, fix: Callable[[], str]) -> Iterator[None]:
    """Convert an out-of-memory error inside the context into a ``TrainingError`` with a remedy.

    Args:
        what: the operation, e.g. ``"predicting"``.
        fix: returns the end of the message: the setting that reduces memory, as the user writes it.

    Raises:
        TrainingError: in place of the out-of-memory error of torch or Python.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise TrainingError(f"The memory is too small for {what}. {fix()}") from error
