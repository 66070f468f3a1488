"""Sizes as people write and read them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latepage.memory import format_size, parse_size


@given(st.integers(0, 1 << 50))
def test_a_plain_number_is_bytes(size: int) -> None:
    assert parse_size(str(size)) == size


@given(st.integers(0, 1023), st.sampled_from(["KiB", "MiB", "GiB", "TiB"]))
def test_what_is_printed_is_read_back(count: int, unit: str) -> None:
    size = parse_size(f"{count} {unit}")
    assert parse_size(format_size(size).removesuffix(" B")) == size


@pytest.mark.parametrize("text", ["", "KiB", "64kb", "64 KB", "-1", "1e3", "0x10", "1.5", "64KiBKiB", "٣"])
def test_what_is_no_size_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match=r"size|whole number"):
        parse_size(text)
