"""`latepage check`: what this host offers, and whether a running VM hangs."""

import codecs
import sys
from io import TextIOWrapper
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from latepage.errors import CheckError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["check"]

PLAIN = {"✓": "+", "✗": "x", "·": ".", "→": ">", "…": "~"}
Flag = Annotated[bool, Parameter(negative=(), show_default=False)]

app = App(
    name="check",
    help_epilogue="Exit status: 0 if `serve` can work here, 1 if it cannot. With VMM-PID: 0 if the VM is well as far as can be "
    "seen, 1 if it hangs or will, 2 if there is no such VM to look at.",
)


@app.default
def check(
    vmm_pid: Annotated[int | None, Parameter(show_default=False)] = None,
    /,
    *,
    vmm_user: Annotated[str | None, Parameter(show_default=False)] = None,
    json: Flag = False,
) -> int:
    """Say what this host offers, or what a running VM waits for.

    Nothing is changed, and nothing is left behind. It works for every user; what only root can see is said to be unseen.

    Args:
        vmm_pid: the process of a VMM: look at its VM, and at who serves it.
        vmm_user: a user by name or as UID:GID: look at whether that user's VMM could make a userfaultfd, and VMs.
        json: print JSON, whose keys stay as they are.
    """
    if vmm_pid is not None:
        if vmm_user is not None:
            return _not_understood("give either VMM-PID or --vmm-user")
        return _vm(vmm_pid, json)
    return _host(vmm_user, json)


def _host(vmm_user: str | None, json: bool) -> int:
    from latepage.check.host import check_host

    try:
        report = check_host(vmm_user)
    except ValueError as error:
        return _not_understood(f"--vmm-user: {error}")
    if json:
        _print_json(report.as_dict())
    else:
        from latepage.check.show import show_host

        show_host(report, _console())
    return 0 if report.can_serve else 1


def _vm(pid: int, json: bool) -> int:
    from latepage.check.vm import check_vm

    try:
        report = check_vm(pid)
    except CheckError as error:
        return _not_understood(str(error))
    if json:
        _print_json(report.as_dict())
    else:
        from latepage.check.show import show_vm

        show_vm(report, _console())
    return 0 if report.is_well else 1


def _console() -> "Console":
    from rich.console import Console

    if isinstance(sys.stdout, TextIOWrapper):
        codecs.register_error("latepage.check", _plainly)
        sys.stdout.reconfigure(errors="latepage.check")
    return Console(highlight=False)


def _plainly(error: UnicodeError) -> tuple[str, int]:
    """Marks as an output without Unicode can have them; a bare question mark would mean another one."""
    assert isinstance(error, UnicodeEncodeError)  # noqa: S101 (nothing is decoded here)
    return "".join(PLAIN.get(sign, "?") for sign in error.object[error.start : error.end]), error.end


def _print_json(report: dict[str, object]) -> None:
    from json import dumps

    print(dumps(report, indent=2))


def _not_understood(why: str) -> int:
    print(f"latepage: {why}", file=sys.stderr)
    return 2
