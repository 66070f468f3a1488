"""`latepage top`: the VMs of a running pager, live, as its status server tells of them."""
