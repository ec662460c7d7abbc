"""Check of gloo for `pretrain doctor`: an all-reduce of two processes on this machine.

python -m pretrain.distributed.gloo_check RANK PORT SECONDS
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

from pretrain.distributed.handshake import check_links
from pretrain.errors import DistributedError

__all__ = ["try_pair"]

_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def try_pair(seconds: float = 60.0) -> dict[str, float]:
    """Start two processes that run `check_links` over gloo.

    Returns:
        The measurements of `check_links`.

    Raises:
        DistributedError: they failed or did not finish in time; the message holds the last line of their output.
    """
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )
    env = {key: value for key, value in os.environ.items() if key not in _LAUNCHED}
    end = time.monotonic() + seconds
    pair = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "pretrain.distributed.gloo_check",
                str(rank),
                str(store.port),
                str(seconds),
            ],
            env=env | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = []
    try:
        for process in pair:
            said.append(process.communicate(timeout=max(0.1, end - time.monotonic())))
    except subprocess.TimeoutExpired:
        raise DistributedError(f"two processes did not meet within {seconds:g} seconds") from None
    finally:
        for process in pair:
            process.kill()
            process.wait()
    for process, (_, complaint) in zip(pair, said, strict=True):
        if process.returncode:
            last = (complaint.strip() or f"exit code {process.returncode}").splitlines()[-1]
            raise DistributedError(f"two processes could not talk: {last[:400]}")
    return dict(json.loads(said[0][0].splitlines()[-1]))


def main(rank: int, port: int, seconds: float) -> None:
    """Run one of the two processes."""
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=seconds)
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", port, is_master=False, timeout=limit
    )
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=limit)

    def add(tensor: torch.Tensor) -> Any:
        return dist.all_reduce(tensor)

    found = check_links(add, torch.device("cpu"), rank, 2, timeout=seconds)
    print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
