"""Sizes, permissions and the like, as a command line takes them."""

from collections.abc import Sequence
from typing import Annotated

from cyclopts import Parameter, Token, validators

from latepage import policy
from latepage.memory import format_size, parse_size
from latepage.reach import Owner as UserAndGroup

__all__ = ["FaultAround", "Mode", "Nice", "Owner", "Realtime", "Size"]


def _size(_type: object, tokens: Sequence[Token]) -> int:
    return parse_size(tokens[0].value)


def _mode(_type: object, tokens: Sequence[Token]) -> int:
    try:
        return int(tokens[0].value, 8)
    except ValueError:
        raise ValueError(f"{tokens[0].value!r} is no file mode: write it in octal, as in 0660") from None


def _owner(_type: object, tokens: Sequence[Token]) -> UserAndGroup:
    return UserAndGroup.parse(tokens[0].value)


def _around(_type: object, tokens: Sequence[Token]) -> int | str:
    return "auto" if tokens[0].value == "auto" else parse_size(tokens[0].value)


def _shown(size: int | None) -> str:
    return "None" if size is None else format_size(size).replace(" ", "")


Size = Annotated[int, Parameter(converter=_size, show_default=_shown)]
"""Bytes, written like 64KiB."""

FaultAround = Annotated[policy.FaultAround, Parameter(converter=_around, n_tokens=1, accepts_keys=False)]
"""Bytes, written like 64KiB, or `auto`."""

Mode = Annotated[int, Parameter(converter=_mode, show_default=lambda mode: f"{mode:04o}")]
"""Permissions of a file, in octal."""

Owner = Annotated[UserAndGroup | None, Parameter(converter=_owner, n_tokens=1, accepts_keys=False)]
"""A user and a group in numbers, written like 1000:1000."""

Realtime = Annotated[int | None, Parameter(validator=validators.Number(gte=1, lte=99))]
"""A priority of SCHED_FIFO."""

Nice = Annotated[int | None, Parameter(validator=validators.Number(gte=-20, lte=19), allow_leading_hyphen=True)]
"""A nice value."""
