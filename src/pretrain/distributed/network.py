"""Network interfaces of this host, and the TCP sockets of the watchdog."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
import sys
from pathlib import Path

from pretrain.errors import DistributedError

__all__ = ["Interface", "connect", "interfaces", "listen", "on_one_host", "tune"]

_SIOCGIFADDR = 0x8915  # Linux ioctl: get the address of an interface
_LOOPBACK = "127.0.0.1"
Interface = dict[str, str | int]


def interfaces() -> list[Interface]:
    """Return the network interfaces with an IPv4 address: name, address, state, mtu, and speed in Mbit/s where known.

    On other systems than Linux the addresses of the host name are returned.
    """
    if not sys.platform.startswith("linux"):
        with contextlib.suppress(OSError):
            found = socket.gethostbyname_ex(socket.gethostname())[2]
            return [{"name": "", "address": address, "state": "up"} for address in found]
        return []
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(asking.fileno(), _SIOCGIFADDR, request)
            except OSError:  # the interface has no address
                continue
            one: Interface = {"name": name, "address": socket.inet_ntoa(answer[20:24])}
            folder = Path("/sys/class/net") / name
            for key, file in (("state", "operstate"), ("mtu", "mtu"), ("speed", "speed")):
                with contextlib.suppress(OSError, ValueError):
                    text = (folder / file).read_text().strip()
                    one[key] = text if key == "state" else int(text)
            found.append(one)
    return found


def on_one_host(size: int) -> bool:
    """Return whether all ``size`` processes are on this host, according to the environment."""
    local = os.environ.get("LOCAL_WORLD_SIZE")
    if local is not None and local.isdigit():
        return int(local) >= size
    return os.environ.get("MASTER_ADDR", _LOOPBACK) in (_LOOPBACK, "localhost", "::1")


def listen(one_host: bool) -> tuple[socket.socket, list[str]]:
    """Return a listening socket on a free port, and the addresses where other processes may reach it, best first.

    One host: loopback only. Several hosts: the address of MASTER_ADDR if this host has it, else that of the interface
    in GLOO_SOCKET_IFNAME, else all interfaces (connections must know the token of the run).

    Raises:
        DistributedError: no socket can be opened.
    """
    if one_host:
        return _bound(_LOOPBACK), [_LOOPBACK]
    wanted = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")
    known = interfaces()
    named = [str(one["address"]) for one in known if one["name"] in wanted]
    for address in [*_resolved(os.environ.get("MASTER_ADDR", "")), *named]:
        # Binding fails if the address belongs to another host, or to a proxy in front of this one.
        with contextlib.suppress(OSError):
            return _bound(address), [address]
    others = [str(one["address"]) for one in known if not str(one["address"]).startswith("127.")]
    try:
        return _bound("0.0.0.0"), others or [_LOOPBACK]
    except OSError as error:
        raise DistributedError(f"Rank 0 cannot open a socket for the watchdog: {error}.") from error


def connect(addresses: list[str], port: int, seconds: float) -> socket.socket:
    """Connect to the first address that answers; every address gets an equal share of the time.

    Raises:
        OSError: no address answers; the last failure.
    """
    failure = OSError(errno.EADDRNOTAVAIL, "rank 0 published no address")
    for address in addresses:
        try:
            return socket.create_connection((address, port), timeout=seconds / len(addresses))
        except OSError as error:
            failure = error
    raise failure


def tune(sock: socket.socket, silence: float) -> None:
    """Send small messages without delay, and let the system close a silent connection after ``silence`` seconds."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {
        "TCP_KEEPIDLE": max(1, int(silence / 3)),
        "TCP_KEEPALIVE": max(1, int(silence / 3)),  # macOS
        "TCP_KEEPINTVL": max(1, int(silence / 6)),
        "TCP_KEEPCNT": 4,
        "TCP_USER_TIMEOUT": int(1000 * silence),
    }
    for name, value in options.items():
        number = getattr(socket, name, None)
        if number is not None:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, number, value)


def _resolved(name: str) -> list[str]:
    if not name:
        return []
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    return [one for one in addresses if one != "::1" and not one.startswith("127.")]


def _bound(address: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.bind((address, 0))
        sock.listen(1024)
    except OSError:
        sock.close()
        raise
    return sock
