"""Connection of the watchdogs of a run: rank 0 listens and publishes its address, and all other ranks connect.

A connection is accepted only if its first line holds the random token of the run, which the processes read from their
store.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import secrets
import selectors
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from pretrain.distributed import network
from pretrain.distributed.json_socket import FIRST, Message, Wire
from pretrain.errors import DistributedError

__all__ = ["Found", "meet"]

Found = dict[int, tuple[Wire, Message]]

_KEY = "lifeline"
_STRANGERS = 256  # limit of simultaneous connections that have not sent the token
_PATIENCE = 10.0  # seconds within which the token must arrive


def meet(store: Any, rank: int, size: int, hello: Message, patience: float) -> tuple[str, Found]:
    """Connect rank 0 with all other ranks.

    Args:
        store: shared by all ranks (`torch.distributed.Store`).
        rank: of this process.
        size: world size.
        hello: message about this process for the other side, with "rank" and "host".
        patience: seconds to wait for all ranks.

    Returns:
        A name of this attempt, equal on all ranks, and connection and hello by rank: of all others on rank 0, of rank
        0 on the others.

    Raises:
        DistributedError: not all ranks connected.
    """
    return (_find_first if rank else _gather)(store, size, hello, patience)


def _gather(store: Any, size: int, hello: Message, patience: float) -> tuple[str, Found]:
    listener, addresses = network.listen(network.on_one_host(size))
    token = secrets.token_hex(16)
    place = {"addresses": addresses, "port": listener.getsockname()[1], "token": token}
    store.set(_KEY, json.dumps(place))
    ranks = set(range(1, size))
    with listener:
        found = _accept_all(listener, token, ranks, patience, lambda wire: wire.send(hello))
    missing = sorted(ranks - set(found))
    for wire, _ in found.values():
        wire.send({"missing": missing})
    if missing:
        for wire, _ in found.values():
            wire.close()
        raise _not_all(missing, size, patience)
    return _name(token), found


def _find_first(store: Any, size: int, hello: Message, patience: float) -> tuple[str, Found]:
    deadline = time.monotonic() + patience
    try:
        store.wait([_KEY], timedelta(seconds=patience))
        place = json.loads(store.get(_KEY))
        left = max(1.0, deadline - time.monotonic())
        wire = Wire(network.connect(place["addresses"], place["port"], left))
    except (OSError, RuntimeError) as error:
        raise DistributedError(
            f"Rank {hello['rank']} on host {hello['host']} cannot reach the watchdog of rank 0: {error}. Check that a "
            "firewall lets the hosts talk on all ports, and that GLOO_SOCKET_IFNAME names the interface between them."
        ) from error
    wire.send(hello | {"token": place["token"]})
    said, end = wire.ask(patience + 5.0), wire.ask(patience + 5.0)
    missing = [0] if said is None or end is None else end["missing"]
    if said is None or missing:
        wire.close()
        raise _not_all(missing, size, patience)
    return _name(place["token"]), {0: (wire, said)}


def _name(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()[:12]


def _not_all(missing: list[int], size: int, seconds: float) -> DistributedError:
    names = ", ".join(map(str, missing[:16])) + ", ..." * (len(missing) > 16)
    return DistributedError(
        f"The watchdog of {size} processes waited {seconds:g} seconds for rank {names}. Look at what these ranks "
        "printed; check that a firewall lets the hosts talk on all ports."
    )


def _first(wire: Wire, token: str) -> tuple[int, Message]:
    """Return rank and first message of a connection.

    The rank is -1 without the token; the message is empty until one has arrived.
    """
    try:
        for message in wire.receive(FIRST)[:1]:
            # JSON may hold a lone surrogate, which strict UTF-8 cannot encode.
            said = str(message.get("token")).encode("utf-8", "surrogatepass")
            if hmac.compare_digest(said, token.encode()):
                return int(message["rank"]), message
            wire.gone = "a stranger"
    except Exception:  # data from an unknown sender must not end the run
        wire.gone = "a stranger"
    return -1, {}


def _accept_all(
    listener: socket.socket,
    token: str,
    ranks: set[int],
    seconds: float,
    welcome: Callable[[Wire], None],
) -> dict[int, tuple[Wire, Message]]:
    """Accept a connection from each of ``ranks`` and close connections without the token.

    Args:
        listener: bound and listening socket.
        token: must be in the first message of a connection.
        ranks: the expected ranks.
        seconds: time limit for all of them.
        welcome: called with each accepted connection.

    Returns:
        Connection and first message by rank; missing ranks are left out.
    """
    deadline = time.monotonic() + seconds
    found: dict[int, tuple[Wire, Message]] = {}
    strangers: dict[Wire, float] = {}
    listener.setblocking(False)
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)

        def drop(wire: Wire) -> None:
            selector.unregister(wire)
            del strangers[wire]
            wire.close()

        while len(found) < len(ranks) and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(min(left, 1.0)):
                if key.fileobj is listener:
                    with contextlib.suppress(OSError):
                        wire = Wire(listener.accept()[0])
                        strangers[wire] = time.monotonic()
                        selector.register(wire, selectors.EVENT_READ)
                    continue
                wire = key.fileobj  # type: ignore[assignment]  # only these two kinds are registered
                rank, message = _first(wire, token)
                if rank in ranks and rank not in found:
                    selector.unregister(wire)
                    del strangers[wire]
                    found[rank] = wire, message
                    welcome(wire)
                elif message or wire.gone:
                    drop(wire)
            old = time.monotonic() - _PATIENCE
            for wire in [w for w, since in strangers.items() if since < old][:_STRANGERS]:
                drop(wire)
            while len(strangers) > _STRANGERS:
                drop(next(iter(strangers)))
        for wire in list(strangers):
            drop(wire)
    return found
