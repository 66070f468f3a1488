"""What is looked at on a host: one item each, with what was found and what to do where something lacks."""

from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["Item", "Need", "State", "known"]

State = Literal["yes", "no", "unknown"]
"""Whether it is there: `unknown` where this process could not try it."""

Need = Literal["serve", "feature", "later", "info"]
"""Who needs it: `serve` itself, a part of latepage, something to come in latepage, or nobody (it is said for people)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One thing that a host offers, or lacks.

    Attributes:
        key: stable name, `SUBJECT.WHAT`; docs/check.md lists them all.
        name: how a person calls it.
        state: whether it is there.
        found: what was seen, in one line.
        need: who needs it.
        value: the same for programs; its type is the key's.
        todo: what to do about a lack, or None.
    """

    key: str
    name: str
    state: State
    found: str
    need: Need = "feature"
    value: Any = None
    todo: str | None = None

    @property
    def subject(self) -> str:
        """The part of the key before the first dot."""
        return self.key.partition(".")[0]

    @property
    def stops_serve(self) -> bool:
        """Whether `serve` cannot work for want of it."""
        return self.need == "serve" and self.state == "no"

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it.

        >>> Item(key="kernel.version", name="kernel", state="yes", found="6.18", need="serve", value="6.18.44").as_dict()
        {'state': 'yes', 'found': '6.18', 'value': '6.18.44', 'need': 'serve', 'todo': None}
        """
        return {"state": self.state, "found": self.found, "value": self.value, "need": self.need, "todo": self.todo}


def known(there: bool | None) -> State:
    """A state from yes, no or could not be tried.

    >>> known(True), known(False), known(None)
    ('yes', 'no', 'unknown')
    """
    return "unknown" if there is None else "yes" if there else "no"
