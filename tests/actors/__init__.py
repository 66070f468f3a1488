"""The processes that play in tests: the pager (`latepage serve`), a peer that says what it is told, and real VMs."""
