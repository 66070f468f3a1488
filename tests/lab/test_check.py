"""`latepage check` finds by trying, on each kernel, the exits that the kernel has."""

import os

from actors.check import check


def test_it_tells_the_exits_of_this_kernel() -> None:
    items = check("--json").report["items"]
    with_userfault = os.environ["LATEPAGE_LAB"] == "userfault"
    assert items["kvm.exit_by_attributes"]["state"] == "yes"
    assert items["kvm.exit_by_userfault"]["state"] == ("yes" if with_userfault else "no")
