"""`latepage serve`: a pager process that supplies the memory of the VMs that connect to a socket."""

import select
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from latepage.cli.output import say
from latepage.cli.rights import lacking
from latepage.cli.signals import Signals
from latepage.cli.sizes import FaultAround, Mode, Nice, Owner, Realtime
from latepage.cli.status import StatusAddress, telling
from latepage.errors import ListenError, PolicyError
from latepage.events import Drained, Event
from latepage.observe.recorder import RING, Recorder
from latepage.pager import Pager
from latepage.policy import OnMissing, Placement, Policy, Populate
from latepage.reach import SEARCH, obstacle
from latepage.reach import Owner as UserAndGroup
from latepage.source import open_source

__all__ = ["as_flags_say", "run", "serve"]

Flag = Annotated[bool, Parameter(negative=(), show_default=False)]

app = App(
    name="serve",
    help_epilogue="Any number of VMs may connect, by Firecracker's page-fault handshake or by latepage's own. SIGTERM, SIGHUP or "
    "Ctrl-C drains: no new VM is taken, those that live get all that they lack, and the command ends with 0 when none needs it "
    "any more. A second SIGTERM or Ctrl-C treats the VMs that still lack memory as --on-missing says, names all that are "
    "left without a pager, and ends with 1.",
)


@app.default
def serve(
    socket: Path,
    source: str,
    /,
    *,
    populate: Populate = "none",
    on_missing: OnMissing = "kill",
    fault_around: FaultAround = "auto",
    placement: Placement = "auto",
    realtime: Realtime = None,
    nice: Nice = None,
    zero_map: Literal["auto", "off"] = "auto",
    mode: Mode = 0o660,
    owner: Owner = None,
    allow_uid: Annotated[tuple[int, ...], Parameter(negative=(), consume_multiple=False, show_default=False)] = (),
    stall_warning: float = 5.0,
    handshake_timeout: float = 5.0,
    detach_when_full: Flag = False,
    metrics: StatusAddress = None,
    metrics_per_vm: Flag = False,
    record: Path | None = None,
    json: Flag = False,
) -> int:
    """Supply the memory of the VMs that connect to SOCKET, from the memory file SOURCE.

    Args:
        socket: where VMs connect; made anew, and removed at the end.
        source: the memory file of the snapshot.
        populate: bring what is touched only (none), or all the rest as well while no fault waits (background).
        on_missing: what happens to a VM whose page cannot be had: kill it, or poison the page. Poison is safe only for
            VMMs that are known to turn it into a machine check or their own death.
        fault_around: how much to bring in one go where a page is touched: auto goes by what was touched before; 64KiB is a
            fixed window; 4KiB brings that page only.
        placement: where the thread that serves a VM runs, and how it waits: auto, block, spin, same-core or core:N.
        realtime: serve faults in the real-time class SCHED_FIFO, with this priority from 1 to 99, where that is allowed.
        nice: serve faults with this nice value, from -20 (first) to 19, where that is allowed.
        zero_map: use, and keep, what is known of zero pages of the memory file (auto), or do not (off); see `latepage scan`.
        mode: permissions of the socket.
        owner: give the socket to this user and group, as UID:GID; takes root.
        allow_uid: serve this user's VMs only; may be given several times.
        stall_warning: report a fault that has waited for so many seconds.
        handshake_timeout: refuse a peer that has not said who it is within so many seconds.
        detach_when_full: let go of each VM as soon as it has all of its memory.
        metrics: tell how it goes over HTTP, at HOST:PORT, :PORT, or a Unix socket's path: /metrics for Prometheus, /healthz,
            /readyz, and /vms, which `latepage top` shows.
        metrics_per_vm: metrics for each VM too, labelled with its name.
        record: a folder; for each VM, VM.trace there says which pages came in, when and why; see `latepage trace`.
        json: write events to standard output as lines of JSON, on a terminal too.
    """
    memory = open_source(source, zero_map=zero_map == "auto")
    if not socket.parent.is_dir():
        raise ListenError(f"socket {socket}: there is no folder {socket.parent}; make it first", call="bind")
    policy = as_flags_say(
        populate=populate,
        on_missing=on_missing,
        fault_around=fault_around,
        placement=placement,
        mode=mode,
        owner=None if owner is None else (owner.uid, owner.gid),
        allow_uids=allow_uid,
        stall_warning=stall_warning,
        handshake_timeout=handshake_timeout,
        detach_when_full=detach_when_full,
        trace=RING if record else 0,
    )
    for line in [*lacking(policy), *_unreachable(socket, owner)]:
        print(f"latepage serve: {line}", file=sys.stderr, flush=True)
    terminal = sys.stderr.isatty() and not json
    # The engine writes the log itself: it goes on while Python does not run.
    log = None if terminal else (sys.stdout if json else sys.stderr).fileno()
    with (
        Signals() as signals,
        Pager(realtime=realtime, nice=nice, log=log) as pager,
        telling("serve", pager, metrics, per_vm=metrics_per_vm),
        Recorder(pager, record) if record else nullcontext(),
    ):
        pager.listen(socket, memory, policy)
        watchers: list[Callable[[Event], None]] = []
        if terminal:
            from latepage.cli.progress import ProgressView

            view: ProgressView | nullcontext[None] = ProgressView(pager, socket, memory)
        else:
            view = nullcontext()
        with view as shown:
            if shown is not None:
                watchers.append(shown.watch)
            left = run(pager, signals, watchers, None if shown is None else shown.refresh)
    for name in left or ():
        say(
            f"latepage: {name}: left without a pager: it was treated as --on-missing says, or its memory must stay registered "
            "and its next discard would wait for ever; end it"
        )
    return 0 if left is None else 1


def _unreachable(socket: Path, owner: UserAndGroup | None) -> list[str]:
    """One line where the owner could not connect. No error: in a jail, what is above the jail does not count."""
    if owner is None:
        return []
    blocked = obstacle(socket.parent, owner, SEARCH)
    return [] if blocked is None else [f"unless it is jailed, user {owner.uid} cannot connect: it {blocked}"]


def as_flags_say(**fields: Any) -> Policy:
    """A policy from flags: what is wrong with it names the flag, not the field."""
    try:
        return Policy(**fields)
    except PolicyError as error:
        field, _, rest = str(error).partition(" ")
        raise PolicyError(f"--{field.removesuffix('s').replace('_', '-')} {rest}") from None


def run(
    pager: Pager,
    signals: Signals,
    watchers: list[Callable[[Event], None]],
    refresh: Callable[[], None] | None,
) -> list[str] | None:
    """Serves until the pager is drained or a second signal arrives.

    SIGHUP only asks to finish, however often: where a terminal is closed, its shell and the kernel may both send it.

    Returns:
        None when drained; else the VMs that are left without a pager: they lacked memory, or theirs must stay registered.
    """
    poll = select.poll()
    poll.register(pager, select.POLLIN)
    poll.register(signals, select.POLLIN)
    asked = False
    while True:
        poll.poll(None if refresh is None else 250)
        for event in pager.events(timeout=0):
            for watch in watchers:
                watch(event)
            if isinstance(event, Drained):
                return None
        for number in signals.take():
            if asked and number != signal.SIGHUP:
                return pager.close()
            asked = asked or number != signal.SIGHUP
            pager.drain()
        if refresh is not None:
            refresh()
