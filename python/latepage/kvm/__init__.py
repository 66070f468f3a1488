"""The reference VMM: a real VMM on /dev/kvm, small enough to read in an evening.

Its guests do nothing but fill, check, dirty and touch pages, so that it can tell which of them are wrong. `Vm` is a VM in this
process, `VmProcess` one in a process of its own (what `python -m latepage.kvm` runs), `Client` speaks to the API
socket of either. All three take the same requests.

>>> from latepage.kvm import Job, Vm
>>> with Vm.create("vm-7", memory=8 << 20, backing="shared", guest="threads") as vm:
...     vm.run(Job("fill", seed=7))
...     filled = vm.wait()
...     vm.run(Job("verify", order="random"))
...     vm.wait().is_right, vm.compare().is_right, vm.report().guest
(True, True, 'threads')
"""

from latepage.kvm.client import Client
from latepage.kvm.jobs import Action, Comparison, Job, JobReport, Order
from latepage.kvm.process import VmProcess
from latepage.kvm.requests import LateReport, NotifyReport, Report, Requests, SaveReport
from latepage.kvm.vm import Backing, ConfigError, Delivery, Guest, Handshake, Shards, Trap, Vm

__all__ = [
    "Action",
    "Backing",
    "Client",
    "Comparison",
    "ConfigError",
    "Delivery",
    "Guest",
    "Handshake",
    "Job",
    "JobReport",
    "LateReport",
    "NotifyReport",
    "Order",
    "Report",
    "Requests",
    "SaveReport",
    "Shards",
    "Trap",
    "Vm",
    "VmProcess",
]
