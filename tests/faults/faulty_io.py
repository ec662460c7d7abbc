"""Stand-ins for `pretrain.utils.files.IO` that kill the process at a call, make it fail, or remember every call."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pretrain.utils.files import FileIO


class FaultyIO(FileIO):
    """Count the calls; at number `at` do what `how` says: "before", "after", "torn", or the name of an errno."""

    def __init__(self, at: int = -1, how: str = "") -> None:
        self.at, self.how, self.calls = at, how, []

    def _call(
        self, name: str, call: Callable[[], Any], path: Any, torn: Callable[[], Any] | None = None
    ) -> Any:
        number = len(self.calls)
        self.calls.append((name, str(path)))
        if number != self.at:
            return call()
        if self.how in ("before", "after", "torn"):
            if self.how == "after":
                call()
            elif self.how == "torn" and torn is not None:
                torn()
            os.kill(os.getpid(), signal.SIGKILL)
        code = getattr(errno, self.how)
        raise OSError(code, os.strerror(code), str(path))

    def open(self, path, flags, mode=0o666):
        return self._call("open", lambda: super(FaultyIO, self).open(path, flags, mode), path)

    def write(self, descriptor, data):
        half = lambda: os.write(descriptor, data[: len(data) // 2])  # noqa: E731
        return self._call(
            "write", lambda: super(FaultyIO, self).write(descriptor, data), descriptor, half
        )

    def fsync(self, descriptor):
        return self._call("fsync", lambda: super(FaultyIO, self).fsync(descriptor), descriptor)

    def rename(self, source, target):
        return self._call("rename", lambda: super(FaultyIO, self).rename(source, target), target)

    def exchange(self, first, second):
        return self._call("exchange", lambda: super(FaultyIO, self).exchange(first, second), second)

    def link(self, source, target):
        return self._call("link", lambda: super(FaultyIO, self).link(source, target), target)

    def unlink(self, path):
        return self._call("unlink", lambda: super(FaultyIO, self).unlink(path), path)

    def rmdir(self, path):
        return self._call("rmdir", lambda: super(FaultyIO, self).rmdir(path), path)

    def mkdir(self, path):
        return self._call("mkdir", lambda: super(FaultyIO, self).mkdir(path), path)


class NetworkIO(FileIO):
    """A network file system on which somebody has files open: they are deleted only under another name.

    Args:
        held: names of these files; empty it when they are closed.
    """

    def __init__(self, held: set[str]) -> None:
        self.held = held

    def unlink(self, path):
        if self.held and Path(path).name.startswith(".nfs"):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))
        if Path(path).name in self.held:
            os.rename(path, Path(path).with_name(".nfs0001"))
        else:
            super().unlink(path)


class RecordingIO(FileIO):
    """Do every call and remember it with paths and data, for `Disk.replay`."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.paths: dict[int, str] = {}

    def open(self, path, flags, mode=0o666):
        descriptor = super().open(path, flags, mode)
        self.paths[descriptor] = str(path)
        if flags & os.O_CREAT:
            self.log.append(("create", str(path)))
        return descriptor

    def write(self, descriptor, data):
        count = super().write(descriptor, data)
        self.log.append(("write", self.paths[descriptor], bytes(data[:count])))
        return count

    def fsync(self, descriptor):
        super().fsync(descriptor)
        self.log.append(("fsync", self.paths[descriptor]))

    def rename(self, source, target):
        super().rename(source, target)
        self.log.append(("rename", str(source), str(target)))

    def unlink(self, path):
        super().unlink(path)
        self.log.append(("remove", str(path)))

    def rmdir(self, path):
        super().rmdir(path)
        self.log.append(("remove", str(path)))

    def mkdir(self, path):
        super().mkdir(path)
        self.log.append(("mkdir", str(path)))


class Node:
    """A file or directory as the kernel sees it, and as the disk has it for certain."""

    def __init__(self, directory: bool) -> None:
        self.directory = directory
        self.data, self.safe_data = b"", b""
        self.entries: dict[str, Node] = {}
        self.safe_entries: dict[str, Node] = {}
        self.pending: list[tuple[str, str, Node | None]] = []

    def change(self, kind: str, name: str, node: Node | None) -> None:
        self.pending.append((kind, name, node))
        self._apply(self.entries, kind, name, node)

    @staticmethod
    def _apply(entries: dict[str, Node], kind: str, name: str, node: Node | None) -> None:
        if kind == "set":
            entries[name] = node
        elif kind == "move":
            target, _, source = name.partition("\0")
            if source in entries:
                entries[target] = entries.pop(source)
        else:
            entries.pop(name, None)

    def sync(self) -> None:
        self.safe_data, self.safe_entries, self.pending = self.data, dict(self.entries), []


class Disk:
    """What a disk may hold after a power cut: what was flushed, plus any part of what was not.

    Changes of one directory reach the disk in their order (journals keep it); different directories and file
    contents are independent.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.node = str(root), Node(True)

    def find(self, path: str) -> Node:
        node = self.node
        for part in Path(path).relative_to(self.root).parts:
            node = node.entries[part]
        return node

    def replay(self, entry: tuple[Any, ...]) -> None:
        kind, path = entry[0], Path(entry[1])
        if kind == "write":
            self.find(entry[1]).data += entry[2]
        elif kind == "fsync":
            self.find(entry[1]).sync()
        elif kind in ("create", "mkdir"):
            self.find(str(path.parent)).change("set", path.name, Node(kind == "mkdir"))
        elif kind == "rename":
            self.find(str(path.parent)).change("move", f"{Path(entry[2]).name}\0{path.name}", None)
        elif kind == "remove":
            self.find(str(path.parent)).change("drop", path.name, None)

    def after_power_cut(self, target: Path, choose: Callable[[int], int]) -> None:
        """Write one possible state to `target`; `choose(n)` says how many of n unflushed changes survived."""
        self._write(self.node, target, choose)

    def _write(self, node: Node, path: Path, choose: Callable[[int], int]) -> None:
        if not node.directory:
            extra = len(node.data) - len(node.safe_data)
            path.write_bytes(
                node.data[: len(node.safe_data) + choose(extra)] if extra else node.data
            )
            return
        path.mkdir()
        entries = dict(node.safe_entries)
        for kind, name, child in node.pending[: choose(len(node.pending))]:
            Node._apply(entries, kind, name, child)
        for name, child in entries.items():
            self._write(child, path / name, choose)
