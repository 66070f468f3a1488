"""`latepage check` as a process."""

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

UNPRIVILEGED = (
    *("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"),
    # Python may lie where only root can read; nothing of what is looked at opens for this one.
    *("--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"),
)
"""Makes of a root's command one of user nobody."""


@dataclass(frozen=True)
class Said:
    """How it ended, and what it said."""

    status: int
    output: str
    errors: str

    @property
    def report(self) -> dict[str, Any]:
        report = json.loads(self.output)
        assert isinstance(report, dict)
        return report


def check(*arguments: str | int, under: tuple[str, ...] = ()) -> Said:
    """Runs it to its end."""
    command = [*under, sys.executable, "-m", "latepage", "check", *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    return Said(done.returncode, done.stdout, done.stderr)
