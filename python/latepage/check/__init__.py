"""What `latepage check` looks at: a host, or a running VM.

>>> from latepage.check import check_host
>>> report = check_host()
>>> report.items["kernel.version"].need
'serve'
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latepage.check.access import Account
    from latepage.check.deliveries import Delivery
    from latepage.check.host import HostReport, check_host
    from latepage.check.items import Item
    from latepage.check.vm import VmReport, check_vm

__all__ = ["Account", "Delivery", "HostReport", "Item", "VmReport", "check_host", "check_vm"]

_HOMES = {
    "Account": "access",
    "Delivery": "deliveries",
    "HostReport": "host",
    "Item": "items",
    "VmReport": "vm",
    "check_host": "host",
    "check_vm": "vm",
}


def __getattr__(name: str) -> Any:
    # `serve` needs a few lines of this package at its start, and nobody waits for the rest.
    if name in _HOMES:
        return getattr(import_module(f"latepage.check.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
