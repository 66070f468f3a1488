"""`python -m latepage.kvm`: a VM in a process of its own, which tells what happens as lines of JSON.

It is what `VmProcess` starts; people may like `latepage vm` better. It imports little, since it is started often.
"""

import argparse
import contextlib
import json
import os
import sys
from typing import Any

from latepage.errors import GuestError
from latepage.kvm.host import Life, live
from latepage.kvm.jobs import Job
from latepage.kvm.vm import ConfigError, Delivery, Shards, default_name, late_memory, pager_memory, parse_shards

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Runs a VM. Exit status: 0 well, 1 pages were wrong or the VM failed, 2 not understood."""
    chosen = parser().parse_args(arguments)
    try:
        return live(life(chosen), tell)
    except ConfigError as error:
        print(f"latepage.kvm: {error}", file=sys.stderr)
        return 2
    except GuestError as error:
        print(f"latepage.kvm: {error}", file=sys.stderr)
        return 1


def tell(event: dict[str, Any]) -> None:
    """Prints a line of JSON; nobody listening is no reason to die."""
    try:
        sys.stdout.write(json.dumps(event, separators=(",", ":")) + "\n")
        sys.stdout.flush()
    except OSError:
        # The interpreter must not trip over what is left in the buffer when it ends.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m latepage.kvm", description=__doc__.partition("\n")[0])
    commands = top.add_subparsers(dest="command", required=True)

    create = commands.add_parser("create", help="a VM with zeroed memory")
    create.add_argument("--memory", type=int, required=True, metavar="BYTES", help="a multiple of 2 MiB")
    create.add_argument("--vcpus", type=int, default=1, help="1 to 64; of threads, to 1024")
    create.add_argument("--split", action="store_true", help="put the upper half of memory at 4 GiB")
    create.add_argument("--backing", choices=("shared", "private", "anonymous", "hugetlb"), default="anonymous")

    restore = commands.add_parser("restore", help="a VM that was saved")
    restore.add_argument("state_file", metavar="STATE")
    origin = restore.add_mutually_exclusive_group(required=True)
    origin.add_argument("--read", metavar="MEMORY", help="read this memory file in first")
    origin.add_argument("--map", metavar="MEMORY", help="map this memory file")
    origin.add_argument("--late", metavar="MEMORY", help="bring this memory file's pages when they are touched")
    origin.add_argument("--pager", metavar="SOCKET", help="have a pager bring the memory")
    restore.add_argument("--delivery", choices=("uffd", "exit", "notify"), help="how accesses reach who brings pages")
    restore.add_argument("--trap", choices=("bitmap", "attributes"), help="with exit or notify: what makes them exits")
    restore.add_argument("--window", type=int, metavar="BYTES", help="with --late: what comes with a touched page")
    restore.add_argument("--notify-all", action="store_true", help="with notify: the pager gets no userfaultfd")
    restore.add_argument("--handshake", choices=("firecracker", "latepage"), default="latepage")
    restore.add_argument("--send-memory", choices=("yes", "no"), help="whether the memfd goes with the handshake")
    restore.add_argument("--shards", type=_shards, metavar="N|auto", help="with --pager: how many userfaultfds, 1 to 64")
    restore.add_argument("--backing", choices=("shared", "private", "anonymous", "hugetlb"))
    restore.add_argument("--paused", action="store_true", help="wait to be resumed")

    for command in (create, restore):
        command.add_argument("--name", default=default_name(), help="vm-PID if not given")
        command.add_argument("--guest", choices=("auto", "kvm", "threads"), default="auto")
        command.add_argument("--job", type=_job, action="append", default=[], metavar="JSON", help="may be given again")
        command.add_argument("--compare", action="store_true", help="after the jobs, compare every byte")
        command.add_argument("--save", nargs=2, metavar=("STATE", "MEMORY"), help="after that, save")
        command.add_argument("--api-sock", metavar="PATH", help="answer requests here, and live until told to end")
        command.add_argument("--stay", action="store_true", help="live until a signal comes")
    return top


def _shards(text: str) -> Shards:
    try:
        return parse_shards(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _job(text: str) -> Job:
    try:
        return Job.from_json(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise argparse.ArgumentTypeError(f"no job: {error!r}") from None


def life(chosen: argparse.Namespace) -> Life:
    """The life that a command line describes."""
    config: dict[str, Any] = {"name": chosen.name, "guest": chosen.guest, "backing": chosen.backing}
    if chosen.command == "create":
        config |= {"memory": chosen.memory, "vcpus": chosen.vcpus, "split": chosen.split}
    else:
        config |= {"state_file": chosen.state_file, "paused": chosen.paused, "memory": _memory(chosen)}
    return Life(
        config=config,
        jobs=tuple(chosen.job),
        compare=chosen.compare,
        save=None if chosen.save is None else (chosen.save[0], chosen.save[1]),
        api_sock=chosen.api_sock,
        stay=chosen.stay,
    )


def _memory(chosen: argparse.Namespace) -> dict[str, Any]:
    if chosen.notify_all and chosen.pager is None:
        raise ConfigError("--notify-all goes with --pager and --delivery notify only")
    if chosen.pager is None and chosen.shards is not None:
        raise ConfigError("--shards goes with --pager only")
    if chosen.late is not None:
        return late_memory(chosen.late, chosen.delivery or "uffd", chosen.trap, chosen.window)
    if chosen.window is not None:
        raise ConfigError("--window goes with --late only")
    if chosen.pager is not None:
        send = None if chosen.send_memory is None else chosen.send_memory == "yes"
        delivery: Delivery = chosen.delivery or "uffd"
        more = {"notify_all": chosen.notify_all, "shards": chosen.shards}
        return pager_memory(chosen.pager, chosen.handshake, send, delivery, chosen.trap, **more)
    if (chosen.delivery, chosen.trap) != (None, None):
        raise ConfigError("--delivery and --trap go with --late or --pager only")
    if chosen.read is not None:
        return {"from": "read", "memory_file": chosen.read}
    return {"from": "map", "memory_file": chosen.map}


if __name__ == "__main__":
    sys.exit(main())
