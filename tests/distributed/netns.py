"""Two or more "hosts" on one machine: network namespaces on a switch whose cables can be pulled (Linux, root).

    with Hosts(2) as hosts:
        crew = Crew(folder, *hosts.inside(1))          # commands that run on host 1
        hosts.cut(1)                                    # for good, without a word: packets vanish
        hosts.mend(1)

Every host is a namespace with one interface ``net0`` and an address of 10.203.0.0/16; the switch is a bridge in a
namespace of its own. ``cut`` takes the host's port out of the bridge, as a dead switch port does: its interface stays
up and nothing arrives. ``unplug`` takes the carrier away, as a pulled cable does.

By hand, for a look: ``python tests/distributed/netns.py 2 -- bash`` runs a command with HOST0, HOST1 in its
environment (the names for ``ip netns exec``).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

__all__ = ["Hosts", "permitted"]


def ip(*words: str) -> None:
    """Run ``ip`` and raise with its message when it fails."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


def permitted() -> str:
    """Why no hosts can be made here; "" when they can."""
    if not sys.platform.startswith("linux") or shutil.which("ip") is None:
        return "needs Linux and the command ip"
    if os.geteuid() != 0:
        return "needs root"
    try:
        with Hosts(1):
            return ""
    except OSError as error:
        return f"network namespaces are not permitted here ({error})"


class Hosts:
    """Namespaces on a switch; a context manager that leaves nothing behind.

    Args:
        number: how many hosts.
    """

    _made = 0

    def __init__(self, number: int) -> None:
        Hosts._made += 1
        self._tag = f"pt{os.getpid()}-{Hosts._made}"
        self._net = f"10.203.{(os.getpid() + Hosts._made) % 250}"
        self.switch = f"{self._tag}-switch"
        self.names = [f"{self._tag}-{index}" for index in range(number)]
        self.addresses = [f"{self._net}.{index + 1}" for index in range(number)]

    def __enter__(self) -> Hosts:
        try:
            ip("netns", "add", self.switch)
            ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
            ip("-n", self.switch, "link", "set", "bridge", "up")
            for index, (name, address) in enumerate(zip(self.names, self.addresses, strict=True)):
                ip("netns", "add", name)
                ip("-n", name, "link", "set", "lo", "up")
                peer = ("peer", "name", f"port{index}", "netns", self.switch)
                ip("-n", name, "link", "add", "net0", "type", "veth", *peer)
                ip("-n", name, "addr", "add", f"{address}/24", "dev", "net0")
                ip("-n", name, "link", "set", "net0", "up")
                ip("-n", self.switch, "link", "set", f"port{index}", "master", "bridge", "up")
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Take everything away; processes inside keep running without a network."""
        for name in (*self.names, self.switch):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def inside(self, index: int) -> list[str]:
        """Words before a command that shall run on this host."""
        return ["ip", "netns", "exec", self.names[index]]

    def cut(self, index: int) -> None:
        """Let everything that this host sends and is sent vanish."""
        ip("-n", self.switch, "link", "set", f"port{index}", "nomaster")

    def mend(self, index: int) -> None:
        """Undo ``cut``."""
        ip("-n", self.switch, "link", "set", f"port{index}", "master", "bridge")

    def unplug(self, index: int) -> None:
        """Take the carrier of this host's interface away."""
        ip("-n", self.switch, "link", "set", f"port{index}", "down")

    def plug(self, index: int) -> None:
        """Undo ``unplug``."""
        ip("-n", self.switch, "link", "set", f"port{index}", "up")


if __name__ == "__main__":
    with Hosts(int(sys.argv[1])) as hosts:
        named = {f"HOST{index}": name for index, name in enumerate(hosts.names)}
        sys.exit(
            subprocess.run(sys.argv[sys.argv.index("--") + 1 :], env=os.environ | named).returncode
        )
