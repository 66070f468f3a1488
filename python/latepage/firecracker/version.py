"""What changed in Firecracker's API when, so that a Firecracker that is too old is told apart before it is asked.

The versions are those of Firecracker's CHANGELOG.md and of `src/vmm/src/persist.rs` (`SNAPSHOT_VERSION`).
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

from latepage.errors import FirecrackerError

__all__ = ["OLDEST", "Version", "made_by", "require"]


class Version(NamedTuple):
    """A version of Firecracker. What comes after a hyphen is not kept: 1.17.0-dev has what 1.17.0 has.

    >>> Version.parse("1.17.0-dev") >= Version(1, 16)
    True
    >>> str(Version.parse("v1.9.1"))
    '1.9.1'
    """

    major: int
    minor: int
    patch: int = 0

    @classmethod
    def parse(cls, text: str) -> Self:
        """The version that Firecracker's API or `firecracker --version` says.

        Raises:
            FirecrackerError: it is no version.
        """
        found = re.match(r"v?(\d+)\.(\d+)(?:\.(\d+))?", text.strip())
        if found is None:
            raise FirecrackerError(f"{text[:80]!r} is no version of Firecracker: does another program answer there?")
        return cls(int(found[1]), int(found[2]), int(found[3] or 0))

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.patch}"


OLDEST = Version(1, 1)
"""The first that takes a guest's memory from a pager (`mem_backend`)."""

_FIELDS: Mapping[str, Mapping[str, Version]] = {
    "PUT /snapshot/load": {
        "resume_vm": Version(0, 24),
        "mem_backend": Version(1, 1),
        "network_overrides": Version(1, 12),
        "track_dirty_pages": Version(1, 13),
        "vsock_override": Version(1, 16),
        "clock_realtime": Version(1, 16),
        "huge_pages": Version(1, 17),
    },
    "PUT /machine-config": {
        "track_dirty_pages": Version(0, 23),
        "huge_pages": Version(1, 7),
        "huge_pages=Transparent": Version(1, 17),
    },
    "PUT /balloon": {
        "amount_mib": Version(1, 0),
        "free_page_hinting": Version(1, 14),
        "free_page_reporting": Version(1, 14),
    },
}
"""For each call, the version that first had a field, or `field=value`. Fields that every version has are not listed."""


def require(version: Version, call: str, body: Mapping[str, Any]) -> None:
    """Refuses a call that this version of Firecracker does not understand.

    >>> require(Version(1, 0), "PUT /snapshot/load", {"mem_backend": {}})
    Traceback (most recent call last):
    ...
    latepage.errors.FirecrackerError: Firecracker 1.0.0 has no mem_backend in PUT /snapshot/load; 1.1.0 has it: use that or ...

    Raises:
        FirecrackerError: it names the version that has the field.
    """
    known = _FIELDS.get(call, {})
    for field, value in body.items():
        for name in (field, f"{field}={value}"):
            since = known.get(name)
            if since is not None and version < since:
                raise FirecrackerError(
                    f"Firecracker {version} has no {name} in {call}; {since} has it: use that or a later one", call=call
                )


def gated(call: str, body: Mapping[str, Any]) -> bool:
    """Whether it depends on the version if this call is understood."""
    known = _FIELDS.get(call, {})
    return any(field in known for field in body)


_FORMATS: Mapping[int, str] = {
    1: "1.7",
    2: "1.8 or 1.9",
    3: "1.10",
    5: "1.11",
    6: "1.12",
    8: "1.13 or 1.14",
    9: "1.15",
    10: "1.16",
    11: "1.17",
}
"""State files by the major number of their format: each Firecracker loads its own only."""


def made_by(format_major: int) -> str | None:
    """Which Firecracker writes state files of a format.

    >>> made_by(8), made_by(99)
    ('1.13 or 1.14', None)
    """
    return _FORMATS.get(format_major)
