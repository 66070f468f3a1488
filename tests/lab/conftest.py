"""Tests of what only the lab's kernels have (`make lab`); anywhere else they skip."""

import os

import pytest

KERNEL = os.environ.get("LATEPAGE_LAB", "")


def pytest_configure(config: pytest.Config) -> None:
    """A mark for what one of the two kernels lacks."""
    config.addinivalue_line("markers", "needs_kernel(name): skip unless the lab runs this kernel")


@pytest.fixture(autouse=True)
def _lab(request: pytest.FixtureRequest) -> None:
    if not KERNEL:
        pytest.skip("needs one of the lab's kernels: make lab")
    for mark in request.node.iter_markers("needs_kernel"):
        if mark.args != (KERNEL,):
            pytest.skip(f"needs the lab's kernel {mark.args[0]}, and this is {KERNEL}")
