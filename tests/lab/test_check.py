"""`latepage check` finds by trying, on each kernel, the exits that the kernel has."""

import os

from actors.check import check


def test_it_tells_the_exits_of_this_kernel_and_which_deliveries_they_carry() -> None:
    report = check("--json").report
    with_userfault = os.environ["LATEPAGE_LAB"] == "userfault"
    assert report["items"]["kvm.exit_by_attributes"]["state"] == "yes"
    assert report["items"]["kvm.exit_by_userfault"]["state"] == ("yes" if with_userfault else "no")
    assert report["items"]["kvm.guest_memfd_mapped"]["state"] == "no"
    delivery = report["deliveries"]["exit"]
    assert (delivery["in_latepage"], delivery["kernel"], delivery["lacks"]) == (True, "yes", [])
