"""Threads that touch memory which comes late, by each delivery: ours in a process of their own, and the C program beside them.

`python -m latepage.bench.crowd JSON` is that process: it imports little, since it is started often.
"""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latepage.bench.machine import cores
from latepage.bench.processes import Pager, ask, cpu_seconds
from latepage.errors import LatepageError

__all__ = ["channel_steps", "main", "ours", "theirs"]

SPINS = 200
"""Looks before a thread sleeps: some microseconds, in which a pager that is awake may have answered."""


def ours(
    delivery: str,
    memory: Path,
    touches: int,
    threads: int,
    pager: Pager | None,
    spins: int | None = None,
    core: int | None = None,
    shards: int = 1,
) -> Mapping[str, float]:
    """A crowd of ours touches so many pages, once each.

    Args:
        delivery: `uffd`, `exit` or `notify`.
        memory: the memory file; the crowd's memory is as large.
        touches: pages that it touches.
        threads: how many.
        pager: who serves it; nobody for `exit`.
        spins: how often a thread looks before it sleeps, for `notify`; by itself not at all where there are more threads and
            pagers than cores, since somebody else could use the core.
        core: where all threads are kept; anywhere if None.
        shards: userfaultfds, each over a part of the memory, for `uffd`.

    Raises:
        LatepageError: it failed, or a page was wrong.
    """
    pages = memory.stat().st_size // 4096
    asked: dict[str, Any] = {"delivery": delivery, "threads": threads, "pages": pages, "touches": touches, "seed": 1}
    if delivery == "notify":
        asked["spins"] = spins if spins is not None else SPINS if threads < len(cores()) else 0
    if core is not None:
        asked["core"] = core
    if shards > 1:
        asked["shards"] = shards
    if pager is None:
        return _figures(_child(asked | {"memory_file": str(memory)}), 0.0)
    before = cpu_seconds(pager.pid)
    said = _child(asked | {"socket": str(pager.socket)})
    served = cpu_seconds(pager.pid) - before
    faults = pager.event("ended")["faults"]
    if faults < 0.99 * touches:
        raise LatepageError(f"the pager saw {faults} faults for {touches} touches: each page should be a fault of its own")
    return _figures(said, served)


def theirs(program: Path, way: str, memory: Path, touches: int, threads: int, *options: str) -> Mapping[str, float]:
    """The C program does the same by its `uffd`, `thread` or `channel`.

    Raises:
        LatepageError: it failed, or a page was wrong.
    """
    size = str(memory.stat().st_size)
    said = ask(program, way, memory, size, f"threads={threads}", f"touches={touches}", *options)
    return _figures(said, said["server_ns"] / 1e9)


def channel_steps(pages: int, *, owner_spins: int, reader_spins: int, cores: tuple[int, int] | None) -> Mapping[str, float]:
    """The steps of a page by the channel, medians in µs by their names.

    Raises:
        LatepageError: it failed.
    """
    said = _child({"pages": pages, "owner_spins": owner_spins, "reader_spins": reader_spins, "cores": cores})
    return {name: ns / 1e3 for name, ns in said.items()}


def _child(asked: Mapping[str, Any]) -> dict[str, Any]:
    return ask(sys.executable, "-m", "latepage.bench.crowd", json.dumps(asked))


def _figures(said: Mapping[str, Any], served: float) -> Mapping[str, float]:
    if said["wrong"]:
        raise LatepageError(f"{said['wrong']} of {said['touches']} pages are wrong")
    return {
        "rate": 1e6 * said["touches"] / said["ns"],
        "CPU a fault": (said["cpu_ns"] / 1e3 + 1e6 * served) / said["touches"],
        "of it the pager's": 1e6 * served / said["touches"],
        "p50": said["p50"] / 1e3,
        "p99": said["p99"] / 1e3,
    }


def main(arguments: list[str]) -> int:
    """The process: does what the JSON says, and prints what came of it."""
    from latepage import _core

    asked = json.loads(arguments[0])
    core = asked.pop("core", None)
    if core is not None:
        os.sched_setaffinity(0, (core,))
    try:
        print(_core.crowd(json.dumps(asked)) if "delivery" in asked else _core.channel_steps(json.dumps(asked)))
    except LatepageError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
