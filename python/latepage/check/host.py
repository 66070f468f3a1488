"""What a host offers, as one report."""

from dataclasses import dataclass, field
from typing import Any

from latepage.check.access import Account
from latepage.check.deliveries import Delivery, deliveries
from latepage.check.items import Item
from latepage.check.kernel import kernel_items
from latepage.check.kvm import kvm_items
from latepage.check.memory import memory_items
from latepage.check.pager import pager_items
from latepage.check.userfaultfd import userfaultfd_items
from latepage.check.vmm import vmm_items

__all__ = ["FORMAT", "HostReport", "check_host"]

FORMAT = 1
"""Version of the JSON. Keys may be added within one; none is renamed or taken away."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HostReport:
    """What was found on this host.

    Attributes:
        items: everything that was looked at, by key, in the order in which it is shown.
        deliveries: what each delivery would need.
        vmm_user: the user whose rights were looked at, or None.
    """

    items: dict[str, Item]
    deliveries: tuple[Delivery, ...] = field(default=())
    vmm_user: Account | None = None

    @property
    def lacking(self) -> tuple[Item, ...]:
        """That for want of which `serve` cannot work."""
        return tuple(item for item in self.items.values() if item.stops_serve)

    @property
    def can_serve(self) -> bool:
        """Whether `serve` can work here: nothing that it needs is known to lack."""
        return not self.lacking

    def as_dict(self) -> dict[str, Any]:
        """As `latepage check --json` prints it; docs/check.md lists the keys."""
        from latepage import __version__

        return {
            "format": FORMAT,
            "latepage": __version__,
            "can_serve": self.can_serve,
            "lacking": [item.key for item in self.lacking],
            "vmm_user": None if self.vmm_user is None else self.vmm_user.name,
            "items": {key: item.as_dict() for key, item in self.items.items()},
            "deliveries": {delivery.name: delivery.as_dict() for delivery in self.deliveries},
        }


def check_host(vmm_user: str | None = None) -> HostReport:
    """Looks at this host, and tries what can be tried without leaving anything behind.

    Args:
        vmm_user: a VMM's user by name, number or `UID:GID`, whose rights are looked at too.

    Raises:
        ValueError: if there is no such user.
    """
    account = None if vmm_user is None else Account.find(vmm_user)
    items = [*kernel_items(), *pager_items(), *userfaultfd_items()]
    if account is not None:
        items += vmm_items(account)
    items += [*kvm_items(), *memory_items()]
    found = {item.key: item for item in items}
    return HostReport(items=found, deliveries=deliveries(found), vmm_user=account)
