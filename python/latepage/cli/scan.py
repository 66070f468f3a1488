"""`latepage scan`: which pages of a memory file are zero, found once for all VMs to come."""

import json as jsonlib
import sys
import time
from pathlib import Path
from typing import Annotated

import cyclopts
from cyclopts import Parameter

from latepage.memory import PAGE, format_size
from latepage.zero_maps import scan as look

__all__ = ["app"]

app = cyclopts.App(
    name="scan",
    help_epilogue="What was not in the page cache does not stay there. `latepage serve` and `restore` learn the same by "
    "themselves as pages come into memory; after a scan they know it from the beginning.",
)


@app.default
def scan(
    file: Path,
    /,
    *,
    json: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
) -> int:
    """Find the zero pages of the memory file FILE, and keep a map of them for whoever serves it.

    Args:
        file: the memory file of a snapshot.
        json: print what was found as JSON.
    """
    begun = time.monotonic()
    found = look(file)
    seconds = time.monotonic() - begun
    for line in found.told:
        print(f"latepage scan: {line}", file=sys.stderr)
    if found.why is not None:
        print(f"latepage scan: no zero map was written: {found.why}", file=sys.stderr)
    if json:
        said = {
            "file": str(file),
            "pages": found.pages,
            "holes": found.holes,
            "zeros": found.zeros,
            "seconds": seconds,
            "map": None if found.map is None else str(found.map),
            "why": found.why,
        }
        print(jsonlib.dumps(said))
        return 0
    rows = {
        "pages": found.pages,
        "in holes": found.holes,
        "zero": found.zeros,
        "to supply": found.pages - found.holes - found.zeros,
    }
    for name, pages in rows.items():
        print(f"{name:10} {pages:>12,}  {format_size(pages * PAGE)}")
    print(f"{'time':10} {seconds:>12.2f}  s")
    if found.map is not None:
        print(f"{'zero map':10} {found.map}")
    return 0
