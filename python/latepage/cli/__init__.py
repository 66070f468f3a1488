"""The command line: one file per command, each imported only when it is called."""

import errno
import signal
import sys

import cyclopts

from latepage.cli.output import mute, open_standard_streams
from latepage.errors import LatepageError, PolicyError

__all__ = ["app", "main"]


def _version() -> str:
    from latepage import __version__

    return __version__


app = cyclopts.App(
    name="latepage",
    help="Supplies a virtual machine's memory late: page by page, at the moment the guest touches it.",
    version=_version,
)
# Their summaries stand here, so that `latepage --help` need not import them.
app.command("latepage.cli.serve:app", name="serve", help="Supply the memory of the VMs that connect to a socket, from a file.")
app.command("latepage.cli.restore:app", name="restore", help="Restore Firecracker VMs from a snapshot, and serve their memory.")
app.command("latepage.cli.vm:app", name="vm", help="Run, save and restore reference VMs.")
app.command("latepage.cli.top:app", name="top", help="Show the VMs of a running pager, live.")
app.command("latepage.cli.check:app", name="check", help="Say what this host offers, or what a running VM waits for.")
app.command("latepage.cli.trace:app", name="trace", help="Show, compare and merge what VMs touched, from recorded traces.")
app.command("latepage.cli.scan:app", name="scan", help="Find the zero pages of a memory file, once for all VMs to come.")
app.command("latepage.cli.bench:app", name="bench", help="Measure how fast it is on this machine, beside the machine's limit.")
app.command("latepage.cli.demo:app", name="demo", help="Restore one VM three ways, and draw where its time went.")


def main() -> None:
    """Runs the command line. Exit codes: 0 done, 1 failed, 2 not understood."""
    open_standard_streams()
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read has had enough.
        mute(sys.stdout)
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename is not None:
            raise
        mute(sys.stdout)
        print(f"latepage: what was to be told could not be written: {error.strerror}", file=sys.stderr)
        sys.exit(1)
    except LatepageError as error:
        print(f"latepage: {error}", file=sys.stderr)
        # A policy comes from flags: one that makes no sense was not understood.
        sys.exit(2 if isinstance(error, PolicyError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
