"""`latepage restore`: starts Firecracker, serves, loads, resumes, and stays as the pager of its VMs."""

import asyncio
import json as jsonlib
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from latepage.cli.output import say
from latepage.cli.rights import lacking
from latepage.cli.serve import as_flags_say, run
from latepage.cli.signals import Signals
from latepage.cli.sizes import FaultAround, Nice, Owner, Realtime
from latepage.cli.status import StatusAddress, telling
from latepage.errors import PolicyError
from latepage.events import Ended, Event, Failed
from latepage.firecracker import Jailer, Options, Restoration, RestoredVm, Step
from latepage.firecracker.restore import bring_up
from latepage.policy import OnMissing, Placement, Populate
from latepage.source import Source, open_source

__all__ = ["app"]

Flag = Annotated[bool, Parameter(negative=(), show_default=False)]
Texts = Annotated[tuple[str, ...], Parameter(negative=(), consume_multiple=False, show_default=False, allow_leading_hyphen=True)]

LAST_PATIENCE = 30.0
"""Seconds that VMs have to get what they lack, where this command fails under them."""

INTERRUPTED = 130
"""Exit status where the restore was taken back by a signal, as a shell has it for Ctrl-C."""

app = App(
    name="restore",
    help_epilogue="It stays as the pager of its VMs until they end. SIGTERM, SIGHUP or Ctrl-C lets them go on without it: they "
    "get all that they lack, and the command ends with 0. A second SIGTERM or Ctrl-C treats those that still lack memory as "
    "--on-missing says, and the command ends with 1. Before the VMs run, a signal takes the restore back: nothing is left of it.",
)


@app.default
def restore(
    *,
    state: Path,
    memory: str,
    firecracker: str = "firecracker",
    clones: int = 1,
    api_sock: Path | None = None,
    socket: Path | None = None,
    owner: Owner = None,
    jailer: str | None = None,
    jail_id: str = "",
    chroot_base_dir: Path = Path("/srv/jailer"),
    jailer_arg: Texts = (),
    firecracker_arg: Texts = (),
    console: Path | None = None,
    network: Texts = (),
    vsock: str | None = None,
    clock_realtime: Flag = False,
    huge_pages: Literal["None", "Transparent", "2M"] | None = None,
    track_dirty_pages: Flag = False,
    paused: Flag = False,
    timeout: float = 30.0,
    populate: Populate = "none",
    on_missing: OnMissing = "kill",
    fault_around: FaultAround = "auto",
    placement: Placement = "auto",
    realtime: Realtime = None,
    nice: Nice = None,
    zero_map: Literal["auto", "off"] = "auto",
    stall_warning: float = 5.0,
    detach_when_full: Flag = False,
    metrics: StatusAddress = None,
    metrics_per_vm: Flag = False,
    record: Path | None = None,
    json: Flag = False,
) -> int:
    """Restore VMs of an unchanged Firecracker: start it, supply their memory as it is touched, load, resume.

    Args:
        state: the state file of the snapshot.
        memory: the memory file of the snapshot.
        firecracker: the Firecracker to start, on PATH or with its path.
        clones: so many VMs of the snapshot, all at once, with one pager.
        api_sock: where the VM's API socket is to be; clones get a number before the suffix. In a private folder if not given.
        socket: where the pager listens; in a private folder if not given.
        owner: run Firecracker as this user and group, as UID:GID, with sockets that it owns; takes root.
        jailer: start it through Firecracker's jailer, as --owner; takes root.
        jail_id: name of the jail; clones get a number after it. Made up if not given.
        chroot_base_dir: folder of the jails.
        jailer_arg: one more argument for the jailer, as --jailer-arg=--new-pid-ns; may be given several times.
        firecracker_arg: one more argument for Firecracker; may be given several times.
        console: append the VMs' standard output to this file: guest consoles and Firecracker's log.
        network: the host's device of a network interface in this place, as eth0=tap7; may be given several times (Firecracker
            1.12).
        vsock: path of the vsock device's socket in this place (Firecracker 1.16).
        clock_realtime: advance kvmclock by the time since the snapshot was taken (Firecracker 1.16).
        huge_pages: what guest memory is made of, if not what it was (Firecracker 1.17).
        track_dirty_pages: so that a diff snapshot can be taken later.
        paused: load the VMs and do not resume them.
        timeout: seconds that each step may take.
        populate: bring what is touched only (none), or all the rest as well while no fault waits (background).
        on_missing: what happens to a VM whose page cannot be had: kill it, or poison the page. Use kill with Firecracker.
        fault_around: how much to bring in one go where a page is touched: auto goes by what was touched before; 64KiB is a
            fixed window; 4KiB brings that page only.
        placement: where the thread that serves a VM runs, and how it waits: auto, block, spin, same-core or core:N.
        realtime: serve faults in the real-time class SCHED_FIFO, with this priority from 1 to 99, where that is allowed.
        nice: serve faults with this nice value, from -20 (first) to 19, where that is allowed.
        zero_map: use, and keep, what is known of zero pages of the memory file (auto), or do not (off); see `latepage scan`.
        stall_warning: report a fault that has waited for so many seconds.
        detach_when_full: let go of each VM as soon as it has all of its memory; with the last, the command ends.
        metrics: tell how it goes over HTTP, at HOST:PORT, :PORT, or a Unix socket's path, as `latepage serve` does.
        metrics_per_vm: metrics for each VM too, labelled with its name.
        record: a folder; for each VM, VM.trace there says which pages came in, when and why; see `latepage trace`.
        json: write steps and events to standard output as lines of JSON, on a terminal too.
    """
    policy = as_flags_say(
        populate=populate,
        on_missing=on_missing,
        fault_around=fault_around,
        placement=placement,
        stall_warning=stall_warning,
        detach_when_full=detach_when_full,
        trace=_ring(record),
        mode=0o600,
    )
    if jailer is None and (jail_id or jailer_arg):
        raise PolicyError("--jail-id and --jailer-arg are for --jailer, which was not given")
    if jailer is not None and owner is None:
        raise PolicyError("--jailer takes --owner UID:GID: as whom Firecracker runs in the jail")
    jail = (
        None
        if jailer is None or owner is None
        else Jailer(program=jailer, owner=owner, chroot_base=chroot_base_dir, id=jail_id, arguments=jailer_arg)
    )
    for line in lacking(replace(policy, allow_uids={os.geteuid() if owner is None else owner.uid})):
        say(f"latepage restore: {line}")
    source = open_source(memory, zero_map=zero_map == "auto")
    report = _Report(json=json, clones=clones)
    options = Options(
        firecracker=firecracker,
        jailer=jail,
        owner=owner,
        clones=clones,
        api_sock=api_sock,
        socket=socket,
        policy=policy,
        realtime=realtime,
        nice=nice,
        resume=not paused,
        network=_devices(network),
        vsock=vsock,
        clock_realtime=clock_realtime,
        huge_pages=huge_pages,
        track_dirty_pages=track_dirty_pages,
        arguments=firecracker_arg,
        console=console,
        timeout=timeout,
        # The engine writes the log itself: it goes on while Python does not run.
        log=report.log,
        on_step=report.step,
    )
    with Signals() as signals, ExitStack() as stack:

        def watch(restoration: Restoration) -> None:
            if restoration.pager is None:  # we never restore by another's pager
                return
            stack.enter_context(telling("restore", restoration.pager, metrics, per_vm=metrics_per_vm))
            if record is not None:
                from latepage.observe.recorder import Recorder

                stack.enter_context(Recorder(restoration.pager, record))

        report.begins(state, firecracker)
        restoration = asyncio.run(_unless_told_to_end(bring_up(state, source, replace(options, on_prepared=watch)), signals))
        if restoration is None:
            say("latepage: the restore was taken back: no VM runs")
            return INTERRUPTED
        try:
            report.running(restoration, paused=paused)
            left = _stay(restoration, signals, [report.heed], source if report.terminal else None)
            restoration.wait_for_killed(left or ())
            failed = [vm for vm in restoration.vms if report.has_ended(vm)]
            # What looks at the pager ends before it does.
            stack.close()
            restoration.release()
            for vm in restoration.vms:
                if vm.lives_on:
                    report.lives_on(vm, left or ())
        finally:
            # Once they run, what goes wrong with us is no reason to end them.
            restoration.leave(LAST_PATIENCE)
    return 1 if left is not None or failed else 0


def _stay(
    restoration: Restoration, signals: Signals, watchers: list[Callable[[Event], None]], shown: Source | None
) -> list[str] | None:
    """Serves until all VMs have ended or need no pager, or as signals say; the VMs that are left lacking, if any.

    On a terminal it shows how they get their memory from the source `shown`.
    """
    pager = restoration.pager
    if pager is None:
        return None
    over = 0

    def count(event: Event) -> None:
        nonlocal over
        over += isinstance(event, Ended)
        if over == len(restoration.vms):
            # Nobody else will come: the socket was made for these.
            pager.drain()

    if shown is None:
        return run(pager, signals, [count, *watchers], None)
    from latepage.cli.progress import ProgressView

    with ProgressView(pager, Path(restoration.vms[0].place.pager_sock), shown) as view:
        return run(pager, signals, [count, *watchers, view.watch], view.refresh)


async def _unless_told_to_end(work: Any, signals: Signals) -> Restoration | None:
    """Does the restore; None if a signal took it back."""
    task: asyncio.Task[Restoration] = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    loop.add_reader(signals.fileno(), task.cancel)
    try:
        return await task
    except asyncio.CancelledError:
        return None
    finally:
        loop.remove_reader(signals.fileno())
        if task.cancelled():
            signals.take()


class _Report:
    """What is told: to people on a terminal, else as lines of JSON beside the engine's."""

    def __init__(self, *, json: bool, clones: int) -> None:
        self.terminal = sys.stderr.isatty() and not json
        self.log = None if self.terminal else (sys.stdout if json else sys.stderr).fileno()
        self._clones = clones
        self._failed: set[str] = set()

    def heed(self, event: Event) -> None:
        """Keeps in mind whose pages could not be had."""
        if isinstance(event, Failed):
            self._failed.add(event.vm)

    def begins(self, state: Path, firecracker: str) -> None:
        if self.terminal:
            say(f"restoring {state} with {firecracker}")

    def step(self, step: Step) -> None:
        if not self.terminal:
            return self._line(step.as_dict())
        who = f"VM {step.clone}  " if self._clones > 1 and step.clone else ""
        pid = f"  pid {step.pid}" if step.step == "start" else ""
        return say(f"  {step.step:<8} {step.seconds * 1e3:8.1f} ms  {who}{step.what}{pid}")

    def running(self, restoration: Restoration, *, paused: bool) -> None:
        now = "loaded, and paused" if paused else "running"
        vms = [
            {
                "clone": vm.clone,
                "pid": vm.pid,
                "api_sock": str(vm.api_sock),
                "firecracker": str(vm.version),
                "steps": vm.steps,
            }
            for vm in restoration.vms
        ]
        if not self.terminal:
            return self._line(
                {"event": "running", "at": time.time(), "seconds": restoration.seconds, "paused": paused, "vms": vms}
            )
        count = "1 VM" if len(vms) == 1 else f"{len(vms)} VMs"
        return say(f"{now}: {count} after {restoration.seconds * 1e3:.1f} ms")

    def has_ended(self, vm: RestoredVm) -> bool:
        """Tells of a VM that has ended; whether it failed."""
        if vm.process.alive:
            return False
        status = vm.process.status
        stderr, console = vm.process.last_words()
        # Where its exit status cannot be had, what the pager did to it is all that is known.
        failed = status != 0 if status is not None else f"vm-{vm.pid}" in self._failed
        if not self.terminal:
            self._line({"event": "vmm-ended", "at": time.time(), "pid": vm.pid, "status": status, "stderr": stderr})
        if failed or status is None:
            words = "".join(f"\n    {line}" for line in (stderr or console).splitlines())
            say(f"latepage: vm-{vm.pid}: Firecracker {vm.process.how_it_ended()}{words}")
        return failed

    def lives_on(self, vm: RestoredVm, lacking: list[str] | tuple[str, ...]) -> None:
        """Tells of a VM that goes on without us."""
        if not self.terminal:
            self._line({"event": "vmm-left", "at": time.time(), "pid": vm.pid, "api_sock": str(vm.api_sock)})
        name = f"vm-{vm.pid}"
        how = "still lacks memory, and stands still where it touches it; end it" if name in lacking else "goes on without a pager"
        say(f"latepage: {name} {how}; its API socket is {vm.api_sock}")

    def _line(self, said: dict[str, Any]) -> None:
        # One write each, past Python's buffers: the engine writes its lines to the same descriptor.
        if self.log is not None:
            try:
                os.write(self.log, jsonlib.dumps(said, separators=(",", ":")).encode() + b"\n")
            except OSError:
                # Nobody reads it any more; the engine has given up too.
                self.log = None


def _devices(pairs: tuple[str, ...]) -> dict[str, str] | None:
    split = [pair.partition("=") for pair in pairs]
    for pair, (name, _, device) in zip(pairs, split, strict=True):
        if not (name and device):
            raise PolicyError(f"--network {pair}: write it as INTERFACE=DEVICE, as in eth0=tap7")
    return {name: device for name, _, device in split} or None


def _ring(record: Path | None) -> int:
    if record is None:
        return 0
    from latepage.observe.recorder import RING

    return RING
