"""How `latepage serve` is told where its workers run and how they wait."""

from dataclasses import fields

from latepage.bench.machine import LackingError
from latepage.policy import Policy

__all__ = ["placed"]

BEFORE = {"auto", "block"}
"""What a pager that knows no placement does."""


def placed(placement: str) -> tuple[str, ...]:
    """The flags for a placement.

    Raises:
        LackingError: this latepage knows no placement.

    >>> placed("auto")
    ()
    """
    if placement == "auto":  # the default, as a user gets it
        return ()
    if "placement" in {field.name for field in fields(Policy)}:
        return ("--placement", placement)
    if placement in BEFORE:
        return ()
    raise LackingError("this latepage has no --placement")
