"""Network interfaces of this host."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
import sys
from pathlib import Path

__all__ = ["Interface", "interfaces"]

_SIOCGIFADDR = 0x8915  # Linux ioctl: get the address of an interface
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
