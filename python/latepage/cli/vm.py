"""`latepage vm`: the reference VMM on the command line."""

import json as jsonlib
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import cyclopts
from cyclopts import Parameter, Token

from latepage.cli.sizes import Size
from latepage.kvm.client import Client
from latepage.kvm.host import Life, live
from latepage.kvm.jobs import Action, Job, Order
from latepage.kvm.vm import (
    Backing,
    ConfigError,
    Delivery,
    Guest,
    Handshake,
    Shards,
    Trap,
    default_name,
    late_memory,
    pager_memory,
    parse_shards,
)

__all__ = ["app"]

Flag = Annotated[bool, Parameter(negative=())]


def _parse_shards(_type: object, tokens: Sequence[Token]) -> Shards:
    return parse_shards(tokens[0].value)


HowManyShards = Annotated[Shards | None, Parameter(converter=_parse_shards, n_tokens=1, accepts_keys=False)]

app = cyclopts.App(
    name="vm",
    help="A small real VM whose guest fills, checks and touches pages: try a pager with it, or see how a VMM uses one.",
)


@app.command
def run(
    *,
    memory: Size = 256 << 20,
    backing: Backing = "anonymous",
    vcpus: int = 1,
    split: Flag = False,
    guest: Guest = "auto",
    name: str | None = None,
    fill: int | None = None,
    verify: Order | None = None,
    compare: Flag = False,
    save: tuple[Path, Path] | None = None,
    api_sock: Path | None = None,
    json: Flag = False,
) -> int:
    """Create a VM, and have its guest fill and check its memory.

    The VM lives until its work is done; with --api-sock, until it is told to end. Ends with 1 if a page was wrong.

    Args:
        memory: how much memory, a multiple of 2 MiB.
        backing: what the memory is made of.
        vcpus: 1 to 64; of a guest of threads, to 1024.
        split: put the upper half of memory at 4 GiB, however small it is.
        guest: kvm, threads that stand in for it, or whichever there is.
        name: its name; vm-PID if not given.
        fill: write the fingerprint of this seed to every page.
        verify: have the guest check every page, in this order.
        compare: compare every byte with what it should be, from outside.
        save: save to this state file and this memory file.
        api_sock: answer `latepage vm pause` and the like at this socket.
        json: tell what happens as lines of JSON.
    """
    config = {
        "name": name or default_name(),
        "memory": memory,
        "backing": backing,
        "vcpus": vcpus,
        "split": split,
        "guest": guest,
    }
    if fill is not None and not 0 <= fill < 1 << 64:
        print(f"latepage vm: --fill is {fill}: give a seed from 0 to 2^64 - 1", file=sys.stderr)
        return 2
    jobs = () if fill is None else (Job("fill", seed=fill),)
    return _live(config, jobs, verify, compare, save, api_sock, json)


@app.command
def restore(
    state: Path,
    /,
    *,
    read: Path | None = None,
    map: Path | None = None,  # noqa: A002 (the flag's name)
    late: Path | None = None,
    delivery: Delivery | None = None,
    trap: Trap | None = None,
    window: Size | None = None,
    pager: Path | None = None,
    notify_all: Flag = False,
    handshake: Handshake | None = None,
    send_memory: bool | None = None,
    shards: HowManyShards = None,
    backing: Backing | None = None,
    guest: Guest = "auto",
    name: str | None = None,
    paused: Flag = False,
    verify: Order | None = None,
    compare: Flag = False,
    save: tuple[Path, Path] | None = None,
    api_sock: Path | None = None,
    json: Flag = False,
) -> int:
    """Restore the VM of a state file, its memory from one of --read, --map, --late and --pager.

    A VM that was saved in the middle of a job goes on with it first.

    Args:
        state: the state file.
        read: read this memory file in before the guest starts.
        map: map this memory file; the kernel brings pages when they are touched.
        late: have the VMM itself bring this memory file's pages when they are touched.
        delivery: with --late or --pager: how accesses to absent pages reach whoever brings them. uffd (the default): by
            userfaultfd; exit (--late): the vCPU's own thread resolves a memory-fault exit; notify (--pager): it posts the
            exit to the pager.
        trap: with --delivery exit or notify: what makes a vCPU's access an exit; by default the best that this kernel has.
        window: with --late: how much comes with a touched page, a multiple of 4 KiB, 64 KiB at most; by default the page alone.
        pager: have the pager at this socket bring the memory.
        notify_all: with --delivery notify: do not give the pager the userfaultfd; post what comes by it, too.
        handshake: the form in which the VM introduces itself to the pager; latepage if not given.
        send_memory: send the memfd of shared or private memory with it, so that the pager fills it through its own view;
            by default for shared memory.
        shards: how many userfaultfds the pager gets, each over a shard of the memory: 1 to 64, or auto for one for each 16
            vCPUs; by default one.
        backing: what the memory is made of; by default what it was.
        guest: kvm, threads that stand in for it, or whichever there is.
        name: its name; vm-PID if not given.
        paused: wait for `latepage vm resume` before the first instruction.
        verify: have the guest check every page, in this order.
        compare: compare every byte with what it should be, from outside.
        save: save it again to this state file and this memory file.
        api_sock: answer `latepage vm pause` and the like at this socket.
        json: tell what happens as lines of JSON.
    """
    config: dict[str, Any] = {
        "name": name or default_name(),
        "state_file": str(state),
        "backing": backing,
        "guest": guest,
        "paused": paused,
    }
    if pager is None and (handshake is not None or shards is not None):
        flag = "--shards" if handshake is None else "--handshake"
        print(f"latepage vm restore: {flag} goes with --pager only", file=sys.stderr)
        return 2
    if late is None and pager is None and (delivery, trap) != (None, None):
        print("latepage vm restore: --delivery and --trap go with --late or --pager only", file=sys.stderr)
        return 2
    if late is None and window is not None:
        print("latepage vm restore: --window goes with --late only", file=sys.stderr)
        return 2
    if pager is None and notify_all:
        print("latepage vm restore: --notify-all goes with --pager and --delivery notify only", file=sys.stderr)
        return 2
    match read, map, late, pager:
        case Path(), None, None, None:
            config["memory"] = {"from": "read", "memory_file": str(read)}
        case None, Path(), None, None:
            config["memory"] = {"from": "map", "memory_file": str(map)}
        case None, None, Path(), None:
            config["memory"] = late_memory(late, delivery or "uffd", trap, window)
        case None, None, None, Path():
            form: Handshake = handshake or "latepage"
            try:
                config["memory"] = pager_memory(
                    pager, form, send_memory, delivery or "uffd", trap, notify_all=notify_all, shards=shards
                )
            except ConfigError as error:
                print(f"latepage vm restore: {error}", file=sys.stderr)
                return 2
        case _:
            print("latepage vm restore: give exactly one of --read, --map, --late and --pager", file=sys.stderr)
            return 2
    for what, path in (("state", state), ("memory", read or map or late)):
        if path is not None and not path.exists():
            print(f"latepage vm restore: there is no {what} file {path}; check the path, or save a VM first", file=sys.stderr)
            return 1
    return _live(config, (), verify, compare, save, api_sock, json)


@app.command
def save(api_sock: Path, state: Path, memory: Path, /, *, json: Flag = False) -> None:
    """Save the VM at API_SOCK to STATE and MEMORY. A running VM is paused for the time.

    Args:
        api_sock: the VM's API socket.
        state: the state file to write.
        memory: the memory file to write; zero pages become holes.
        json: print the result as JSON.
    """
    with Client(api_sock) as vm:
        saved = vm.save(state, memory)
    text = f"saved {_size(saved.memory_bytes)} ({_size(saved.data_bytes)} of data) in {saved.ns / 1e6:.0f} ms"
    _print(asdict(saved), text, json)


@app.command
def pause(api_sock: Path, /) -> None:
    """Take the vCPUs of the VM at API_SOCK out of the guest.

    Args:
        api_sock: the VM's API socket.
    """
    with Client(api_sock) as vm:
        vm.pause()


@app.command
def resume(api_sock: Path, /) -> None:
    """Let the vCPUs of the VM at API_SOCK go on.

    Args:
        api_sock: the VM's API socket.
    """
    with Client(api_sock) as vm:
        vm.resume()


@app.command
def discard(
    api_sock: Path,
    /,
    *,
    first: int | None = None,
    count: int = 1,
    gpa: Size | None = None,
    size: Size | None = None,
) -> None:
    """Give memory of the VM at API_SOCK back to the host, as a balloon does. It reads as zero from then on.

    Args:
        api_sock: the VM's API socket.
        first: the first page to discard; page 0 lies at 2 MiB.
        count: how many pages.
        gpa: or: the guest-physical address to begin at.
        size: with --gpa: how much, a multiple of 4 KiB.
    """
    if (first is None) == (gpa is None) or (gpa is None) != (size is None):
        raise ConfigError("give --first and --count, or --gpa and --size")
    with Client(api_sock) as vm:
        if gpa is None:
            vm.discard(first, count)
        else:
            vm.discard(gpa=gpa, size=size)


@app.command
def job(
    api_sock: Path,
    action: Action,
    /,
    *,
    seed: int = 0,
    order: Order = "sequential",
    pages: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    wait: bool = True,
    json: Flag = False,
) -> int:
    """Have the guest of the VM at API_SOCK do a job: fill, dirty, verify, touch, say or count.

    Ends with 1 if a page was wrong.

    Args:
        api_sock: the VM's API socket.
        action: what to do; `dirty` needs --pages, and `count` goes on for ever.
        seed: the fingerprint to write, and the order drawn at random.
        order: the order in which each vCPU goes over its pages.
        pages: only these pages, as FIRST+COUNT or one number; may be given several times.
        wait: wait until it is over.
        json: print the result as JSON.
    """
    runs = tuple(_run(text) for text in pages)
    with Client(api_sock) as vm:
        vm.run(Job(action, seed=seed, order=order, pages=runs or None))
        if not wait or action == "count":
            return 0
        report = vm.wait()
    took = ((report.ended_ns or 0) - report.started_ns) / 1e9
    _print(asdict(report), f"{action}: {report.done} pages in {took:.3f} s{_wrong(report.wrong_pages, report.wrong)}", json)
    return 1 if report.wrong_pages else 0


@app.command
def stop(api_sock: Path, /) -> None:
    """End the job of the VM at API_SOCK as far as it is; not one that writes.

    Args:
        api_sock: the VM's API socket.
    """
    with Client(api_sock) as vm:
        vm.stop()


@app.command
def compare(api_sock: Path, /, *, json: Flag = False) -> int:
    """Compare every byte of the VM at API_SOCK with what it should be. Ends with 1 if a page is wrong.

    Args:
        api_sock: the VM's API socket.
        json: print the result as JSON.
    """
    with Client(api_sock) as vm:
        result = vm.compare()
    _print(asdict(result), _compared(asdict(result)), json)
    return 0 if result.is_right else 1


@app.command
def report(api_sock: Path, /, *, json: Flag = False) -> None:
    """Tell what the VM at API_SOCK is and does.

    Args:
        api_sock: the VM's API socket.
        json: print the result as JSON.
    """
    with Client(api_sock) as vm:
        fields = vm.request("report")
    lines = [
        f"{fields['name']}: {fields['status']}, pid {fields['pid']}",
        f"  guest     {_guest(fields)}",
        f"  contents  {', '.join(f'{_content(seed)} {pages} pages' for seed, pages in fields['contents'])}",
    ]
    if fields["error"]:
        lines.append(f"  error     {fields['error']}")
    if fields["pager"]:
        lines.append(f"  pager     {fields['pager'][0]} ({fields['pager'][1]} handshake{_shards(fields, ', ')})")
    if fields["late"]:
        lines.append(f"  late      {_late(fields['late'])}")
    if fields["notify"]:
        lines.append(f"  notify    {_notify(fields['notify'])}")
    for label, of in (("job", fields["job"]), ("last job", fields["last_job"])):
        if of:
            wrong = _wrong(of["wrong_pages"], of["wrong"])
            lines.append(f"  {label:<9} {of['job']['action']}: {of['done']} of {of['pages']} pages{wrong}")
    _print(fields, "\n".join(lines), json)


@app.command(name="quit")
def quit_(api_sock: Path, /) -> None:
    """End the VM at API_SOCK.

    Args:
        api_sock: the VM's API socket.
    """
    with Client(api_sock) as vm:
        vm.quit()


def _live(
    config: dict[str, Any],
    jobs: tuple[Job, ...],
    verify: Order | None,
    compare: bool,
    save: tuple[Path, Path] | None,
    api_sock: Path | None,
    json: bool,
) -> int:
    wrong = None if save is None else _unsavable(*save)
    if wrong is not None:
        print(f"latepage vm: {wrong}", file=sys.stderr)
        return 2
    if verify is not None:
        jobs = (*jobs, Job("verify", order=verify))
    life = Life(
        config=config,
        jobs=jobs,
        compare=compare,
        save=None if save is None else (str(save[0]), str(save[1])),
        api_sock=None if api_sock is None else str(api_sock),
    )
    try:
        return live(life, _tell_json if json else _tell)
    except ConfigError as error:
        print(f"latepage vm: {error}", file=sys.stderr)
        return 2


def _unsavable(state: Path, memory: Path) -> str | None:
    """Why a VM cannot be saved to these two, as far as it can be known before it has worked."""
    if state.resolve() == memory.resolve():
        return f"--save {state} {memory}: the state file and the memory file must be two files"
    for path in (state, memory):
        if path.is_dir():
            return f"--save {path}: it is a folder; name a file"
        if not path.parent.is_dir():
            return f"--save {path}: there is no folder {path.parent}; make it first"
    return None


def _tell_json(event: dict[str, Any]) -> None:
    print(jsonlib.dumps(event, separators=(",", ":")), flush=True)


def _tell(event: dict[str, Any]) -> None:
    line = _line(event)
    if line is not None:
        print(f"{event['vm']}: {line}", flush=True)


def _line(event: dict[str, Any]) -> str | None:
    """An event as people read it; None for one that they need not see."""
    match event["event"]:
        case "started":
            at = f", API socket {event['api_sock']}" if event["api_sock"] else ""
            return f"ready after {event['ready_ns'] / 1e6:.1f} ms; {_guest(event)}{_shards(event, '; ')}{at}"
        case "first_instruction":
            return f"first instruction after {event['ns'] / 1e6:.1f} ms"
        case "progress":
            return f"{event['done']} of {event['pages']} pages after {event['ns'] / 1e9:.3f} s" if event["pages"] else None
        case "wrong_page":
            return f"page {event['page']} is WRONG"
        case "job_done":
            job = event["report"]
            took = (job["ended_ns"] - job["started_ns"]) / 1e9
            name = f"{job['job']['action']} ({job['job']['order']})"
            return f"{name}: {job['done']} pages in {took:.3f} s{_wrong(job['wrong_pages'], job['wrong'])}"
        case "compared":
            return _compared(event)
        case "saved":
            data = f"{_size(event['memory_bytes'])} of memory, {_size(event['data_bytes'])} of it data"
            return f"saved to {event['state_file']} and {event['memory_file']}: {data}"
        case "pager_gone":
            said = f": {event['said']}" if event["said"] else ""
            return f"the pager has closed the connection{said}"
        case "pager_back":
            return "another pager is there, and has the VM"
        case "failed":
            return f"FAILED: {event['error']}"
        case "ended" if event["error"]:
            return f"ended: {event['error']}"
        case "idle":
            return "all done; waiting for requests"
    return None


def _shards(fields: dict[str, Any], before: str) -> str:
    """How many userfaultfds, where that needs a word."""
    count, note = fields["shards"] or (1, None)
    if note is not None:
        return f"{before}{note}"
    return f"{before}{count} shards" if count > 1 else ""


def _guest(fields: dict[str, Any]) -> str:
    kind = "on KVM" if fields["guest"] == "kvm" else "threads in place of a guest (no KVM)"
    memory = f"{_size(fields['memory'])} of {fields['backing'].replace('_', ' ')} memory"
    return f"{kind}, {fields['vcpus']} vCPU{'s' if fields['vcpus'] > 1 else ''}, {memory}"


def _late(fields: dict[str, Any]) -> str:
    by = f"exit by {fields['trap']}" if fields["trap"] else fields["delivery"]
    counts = f"{fields['exits']} exits, {fields['faults']} faults, {fields['filled']} pages filled, {fields['zero']} zero"
    return f"{fields['memory_file']} ({by}): {counts}"


def _notify(fields: dict[str, Any]) -> str:
    by = f"exit by {fields['trap']}" if fields["trap"] else "signal"
    forwarded = f" ({fields['forwarded']} from userfaultfd)" if fields["all"] else ""
    return f"{by}: {fields['exits']} exits, {fields['posted']} posted{forwarded}, {fields['removed']} discards"


def _compared(fields: dict[str, Any]) -> str:
    system = [f"{gpa:#x}" for gpa in fields["wrong_system"]]
    more = f"; system area wrong at {', '.join(system)}" if system else ""
    return f"compared every byte of {fields['pages']} pages{_wrong(fields['wrong_pages'], fields['wrong'])}{more}"


def _wrong(count: int, pages: list[int] | tuple[int, ...]) -> str:
    if not count:
        return ", all right"
    named = ", ".join(str(page) for page in pages[:16])
    return f", {count} WRONG: {named}{' …' if count > 16 else ''}"


def _content(seed: int | None) -> str:
    return "zero" if seed is None else f"seed {seed}"


def _size(count: int) -> str:
    return f"{count / (1 << 20):.6g} MiB"


def _run(text: str) -> tuple[int, int]:
    first, _, count = text.partition("+")
    try:
        return int(first), int(count or "1")
    except ValueError:
        raise ConfigError(f"--pages takes FIRST+COUNT or a page's number, not {text!r}") from None


def _print(fields: dict[str, Any], text: str, json: bool) -> None:
    print(jsonlib.dumps(fields) if json else text)
