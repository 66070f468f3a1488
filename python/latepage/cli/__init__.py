"""The command line: one file per command, each imported only when it is called."""

import sys

import cyclopts

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
app.command("latepage.cli.vm:app", name="vm", help="Run, save and restore reference VMs.")
app.command("latepage.cli.demo:app", name="demo", help="Restore one VM three ways, and draw where its time went.")


def main() -> None:
    """Runs the command line. Exit codes: 0 done, 1 failed, 2 not understood."""
    try:
        sys.exit(app())
    except LatepageError as error:
        print(f"latepage: {error}", file=sys.stderr)
        # A policy comes from flags: one that makes no sense was not understood.
        sys.exit(2 if isinstance(error, PolicyError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
