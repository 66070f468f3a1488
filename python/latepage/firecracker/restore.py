"""Restoring VMs of an unchanged Firecracker: start it, serve, load, resume."""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Awaitable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from latepage.errors import FirecrackerError, PolicyError
from latepage.events import Event, Failed, NoMemory, Refused, Stall
from latepage.firecracker.calls import MemoryBackend
from latepage.firecracker.explain import explanation
from latepage.firecracker.jailer import Jail
from latepage.firecracker.options import Options
from latepage.firecracker.output import OutputReader
from latepage.firecracker.place import Folder, Place, check_readable, check_socket_path, check_text, numbered
from latepage.firecracker.process import VmmProcess, find_program
from latepage.firecracker.restoration import Restoration, RestoredVm, Step
from latepage.firecracker.state_file import StateFile
from latepage.firecracker.version import OLDEST, Version, require
from latepage.pager import Pager
from latepage.policy import Policy
from latepage.reach import SEARCH
from latepage.source import Source, open_source

if TYPE_CHECKING:
    from latepage.firecracker.client import AsyncClient

__all__ = ["bring_up", "restore", "restoring"]

Name = str | os.PathLike[str]
T = TypeVar("T")


def restore(state: Name, memory: Name | Source | None = None, **options: Any) -> Restoration:
    """Restores VMs from a snapshot, and returns when they run.

    Args:
        state: the state file of the snapshot.
        memory: what their memory comes from: a memory file or any source; None with `pager_sock` only.
        options: the fields of `Options`.

    Returns:
        The VMs and their pager. It is a context manager that ends them; `leave` lets them go on.

    Raises:
        FirecrackerError: a step failed; nothing is left of any of the VMs.
        PolicyError: the options make no sense.
        SourceError: the memory cannot be served.
        ListenError: the pager cannot listen.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(bring_up(state, memory, Options(**options)))
    raise FirecrackerError("restore() waits, and an event loop runs in this thread: use `async with restoring(…)`")


@contextlib.asynccontextmanager
async def restoring(state: Name, memory: Name | Source | None = None, **options: Any) -> AsyncIterator[Restoration]:
    """`restore` for asyncio: the VMs run inside of the block, and are ended at its end unless they were let go.

    Cancelling it takes the restore back. The arguments and errors are those of `restore`.
    """
    restoration = await bring_up(state, memory, Options(**options))
    try:
        yield restoration
    finally:
        # It waits for processes and threads to end.
        await asyncio.to_thread(restoration.close)


async def bring_up(state: Name, memory: Name | Source | None, options: Options) -> Restoration:
    """Restores; what `restore` and `restoring` have in common."""
    begun = time.monotonic()
    if (memory is None) == (options.pager_sock is None):
        raise PolicyError("say where the VMs' memory comes from: memory, or pager_sock, and not both")
    work = _Work(Path(state), options)
    restoration = work.prepare(memory)
    try:
        work.done("prepare", 0, None, begun, "the pager listens" if restoration.pager else "another pager serves")
        if options.on_prepared is not None:
            options.on_prepared(restoration)
        for clone in range(1, options.clones + 1):
            work.start(clone)
        vms = [asyncio.create_task(work.one(vm)) for vm in restoration.vms]
        try:
            await asyncio.gather(*vms)
        finally:
            for task in vms:
                task.cancel()
            await asyncio.gather(*vms, return_exceptions=True)
        restoration.seconds = time.monotonic() - begun
    except BaseException as error:
        # The VMs first: a pager that is closed under a living VM would have to kill it.
        restoration.close()
        told = [] if restoration.pager is None else list(restoration.pager.events(timeout=0))
        # An error holds the frames that it came through, and they would hold the pager's descriptors.
        restoration.pager = None
        if isinstance(error, FirecrackerError):
            raise _with_words_of_the_pager(error, told) from None
        raise
    return restoration


class _Work:
    """One restore, while it is going on."""

    def __init__(self, state: Path, options: Options) -> None:
        self.options = options
        self.state = StateFile.open(state)
        self.program = find_program(options.firecracker)
        self.jailer = None if options.jailer is None else find_program(options.jailer.program)
        self.restoration: Restoration

    def done(self, step: str, clone: int, pid: int | None, since: float, what: str) -> float:
        """Tells of a step."""
        seconds = time.monotonic() - since
        told = Step(step, clone, pid, seconds, time.time(), what)
        self.restoration.steps.append(told)
        if self.options.on_step is not None:
            self.options.on_step(told)
        return seconds

    def prepare(self, memory: Name | Source | None) -> Restoration:
        """All that is done before a process is started: what cannot work is refused here, and the pager listens."""
        options, owner = self.options, self.options.runs_as
        source = memory if isinstance(memory, Source) or memory is None else open_source(memory)
        if options.jailer is None:
            check_text(self.state.path, "state file")
            check_readable(self.state.path, "state file", owner)
        with contextlib.ExitStack() as undo:
            folder = Folder(None if options.jailer is not None else owner)
            undo.callback(folder.remove)
            reader = OutputReader()
            undo.callback(reader.close)
            pager = None
            if source is not None:
                pager = undo.enter_context(Pager(realtime=options.realtime, nice=options.nice, log=options.log))
            self.console = None
            if options.console is not None:
                self.console = _append_to(options.console)
                undo.callback(os.close, self.console)
            self.jails: list[Jail] = []
            self.places = [self._place(folder, clone, undo) for clone in range(1, options.clones + 1)]
            policy = options.policy or Policy()
            if owner is not None:
                policy = replace(policy, owner=(owner.uid, owner.gid))
            if pager is not None and source is not None:
                for path in dict.fromkeys(place.pager_sock for place in self.places):
                    pager.listen(path, source, policy)
            self.restoration = Restoration(
                pager, folder, reader, console=self.console, jails=self.jails, on_missing=policy.on_missing
            )
            self.reader = reader
            undo.pop_all()
        return self.restoration

    def _place(self, folder: Folder, clone: int, undo: contextlib.ExitStack) -> Place:
        options = self.options
        if options.jailer is not None:
            jail = Jail(options.jailer, self.program, self.state, folder, clone, options.clones)
            undo.callback(jail.remove)
            self.jails.append(jail)
            return jail.place
        api_sock = folder.path / "api.sock" if options.api_sock is None else Path(options.api_sock)
        api_sock = numbered(api_sock, clone, options.clones)
        check_socket_path(api_sock, "API socket", options.runs_as)
        if options.pager_sock is not None:
            pager_sock = Path(options.pager_sock)
        else:
            pager_sock = folder.path / "pager.sock" if options.socket is None else Path(options.socket)
            check_socket_path(pager_sock, "the pager's socket", options.runs_as, SEARCH)
        if api_sock.absolute() == pager_sock.absolute():
            raise FirecrackerError(f"{api_sock}: it is named for the API socket and for the pager's; choose two paths")
        return Place(
            api_sock=api_sock,
            pager_sock=pager_sock,
            api_sock_inside=str(api_sock),
            pager_sock_inside=str(pager_sock),
            state_inside=str(self.state.path),
        )

    def start(self, clone: int) -> None:
        """Starts one VMM. From here on it is ended with the others."""
        place = self.places[clone - 1]
        jail = self.jails[clone - 1] if self.jails else None
        arguments = self.options.arguments
        if jail is not None and self.jailer is not None:
            command, user = [*jail.command(self.jailer), *arguments], None
        else:
            command, user = [str(self.program), "--api-sock", place.api_sock_inside, *arguments], self.options.runs_as
        begun = time.monotonic()
        process = VmmProcess.start(command, self.reader, user=user, console=self.console)
        vm = RestoredVm(clone, process, Version(0, 0), place, begun, _jail=jail)
        self.restoration.vms = (*self.restoration.vms, vm)

    async def one(self, vm: RestoredVm) -> None:
        """Restores the VM of a VMM that was started."""
        from latepage.firecracker.client import AsyncClient

        options, place, clone = self.options, vm.place, vm.clone
        client = AsyncClient(place.api_sock, timeout=None)
        try:
            if self.jails and self.jails[clone - 1].will_hand_over:
                await self._follow(vm, self.jails[clone - 1])
            vm.version = await self._step(vm, self._answering(client, place), "start")
            vm.steps["start"] = self.done("start", clone, vm.pid, vm.begun, f"Firecracker {vm.version}, {place.api_sock}")
            begun = time.monotonic()
            await self._step(vm, self._load(client, vm), "load")
            for path in place.made:
                path.unlink(missing_ok=True)
            vm.steps["load"] = self.done("load", clone, vm.pid, begun, str(self.state))
            if options.resume:
                begun = time.monotonic()
                await self._step(vm, client.resume(), "resume")
                vm.steps["resume"] = self.done("resume", clone, vm.pid, begun, "its vCPUs run")
        finally:
            await client.close()

    async def _follow(self, vm: RestoredVm, jail: Jail) -> None:
        """The jailer ends once it has started Firecracker in a new pid namespace: from then on that is the VM."""
        try:
            async with asyncio.timeout(self.options.timeout):
                await vm.process.ended()
        except TimeoutError:
            raise self._late(vm, "start") from None
        pid = jail.pid()
        if vm.process.status != 0 or pid is None:
            raise self._died(vm, "start")
        vm.process.become(pid)

    async def _answering(self, client: "AsyncClient", place: Place) -> Version:
        """Waits until the API socket answers; there is no event for it, so it is tried."""
        pause = 0.0005
        while True:
            if place.api_sock.exists():
                try:
                    version = await client.version()
                except FirecrackerError as error:
                    if error.call != "connect":
                        raise
                else:
                    if version < OLDEST:
                        require(version, "PUT /snapshot/load", {"mem_backend": None})
                    return version
            await asyncio.sleep(pause)
            pause = min(0.01, pause * 1.2)

    async def _load(self, client: "AsyncClient", vm: RestoredVm) -> None:
        options, place = self.options, vm.place
        await client.load_snapshot(
            place.state_inside,
            MemoryBackend("Uffd", place.pager_sock_inside),
            track_dirty_pages=options.track_dirty_pages,
            network=options.network,
            vsock=options.vsock,
            clock_realtime=options.clock_realtime,
            huge_pages=options.huge_pages,
        )

    async def _step(self, vm: RestoredVm, work: Awaitable[T], step: str) -> T:
        """Does one thing, but no longer than its VMM lives, nor than it may take."""
        task = asyncio.ensure_future(work)
        end = asyncio.ensure_future(vm.process.ended())
        try:
            await asyncio.wait({task, end}, timeout=self.options.timeout, return_when=asyncio.FIRST_COMPLETED)
            if end.done() and not task.done() and step != "start":
                # What it said last may still be on its way to us.
                await asyncio.wait({task}, timeout=0.5)
            if task.done():
                try:
                    return task.result()
                except FirecrackerError as error:
                    raise await self._failed(vm, step, error, end) from None
            raise self._died(vm, step) if end.done() else self._late(vm, step)
        finally:
            for one in (task, end):
                one.cancel()
            await asyncio.gather(task, end, return_exceptions=True)

    async def _failed(self, vm: RestoredVm, step: str, error: FirecrackerError, end: "asyncio.Future[None]") -> FirecrackerError:
        """An error with all that there is to say about it."""
        if error.status is None and error.call is not None:
            # It did not answer: if it has ended, that is the news.
            await asyncio.wait({end}, timeout=1)
            if end.done():
                return self._died(vm, step)
        ours = explanation(error, self.state, vm.version, self.options.runs_as)
        if error.status is not None and step == "load":
            # A Firecracker that could not load ends by itself, and says something more.
            await asyncio.wait({end}, timeout=1)
        stderr = vm.process.last_words()[0] if end.done() else ""
        lines = [ours] if ours else []
        lines += [str(error)] + ([f"  its standard error: {_indented(stderr)}"] if stderr else [])
        return FirecrackerError(
            "\n".join(lines),
            status=error.status,
            fault_message=error.fault_message,
            stderr=stderr or None,
            vm=f"vm-{vm.pid}",
            call=error.call,
            errno=error.errno,
        )

    def _died(self, vm: RestoredVm, step: str) -> FirecrackerError:
        vm.process.wait(0)
        stderr, console = vm.process.last_words()
        when = {"start": "before it answered at its API socket", "load": "while it loaded", "resume": "while it resumed"}[step]
        what = f"{when} {self.state.path}" if step == "load" else when
        lines = [f"{self.program} (pid {vm.pid}) {vm.process.how_it_ended()} {what}"]
        lines += [f"  its standard error: {_indented(stderr)}"] if stderr else []
        lines += [f"  the last of its standard output: {_indented(console)}"] if console else []
        return FirecrackerError("\n".join(lines), stderr=stderr or None, vm=f"vm-{vm.pid}", call=step)

    def _late(self, vm: RestoredVm, step: str) -> FirecrackerError:
        what = {"start": "its API socket did not answer", "load": "the snapshot was not loaded", "resume": "it did not resume"}[
            step
        ]
        return FirecrackerError(
            f"{self.program} (pid {vm.pid}): {what} within {self.options.timeout:g} s (--timeout); it was ended",
            vm=f"vm-{vm.pid}",
            call=step,
        )


def _with_words_of_the_pager(error: FirecrackerError, told: list[Event]) -> FirecrackerError:
    """Adds why the pager refused or failed a VM, which Firecracker cannot know."""
    lines = filter(None, map(_why, told))
    error.args = ("\n".join([str(error), *dict.fromkeys(lines)]),)
    return error


def _why(event: Event) -> str | None:
    match event:
        case Refused():
            return f"  the pager refused it: {event.reason}"
        case Failed():
            return f"  the pager: {event.reason} ({event.action})"
        case NoMemory():
            return "  the pager: the machine has no memory for a page of it; are huge pages free (/proc/sys/vm/nr_hugepages)?"
        case Stall():
            return "  the pager: a fault waited for its page; is its source slow?"
    return None


def _append_to(path: Name) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise FirecrackerError(f"console {os.fspath(path)}: {error.strerror}", call="open", errno=error.errno) from None


def _indented(text: str) -> str:
    return text if "\n" not in text else "".join(f"\n    {line}" for line in text.split("\n"))
