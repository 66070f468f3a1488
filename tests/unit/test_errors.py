"""Errors: one tree, one base; each says where it happened."""

from pathlib import Path

import pytest

import latepage
from latepage import LatepageError, SourceError, errors, open_source


def test_every_error_has_the_one_base_and_is_public() -> None:
    for name in errors.__all__:
        assert issubclass(getattr(errors, name), LatepageError)
        assert getattr(latepage, name) is getattr(errors, name)


def test_a_missing_memory_file_says_the_call_and_its_errno(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such file") as error:
        open_source(tmp_path / "none")
    assert (error.value.call, error.value.errno) == ("open", 2)


def test_an_empty_memory_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(SourceError, match="empty"):
        open_source(tmp_path / "empty")


def test_a_folder_is_no_memory_file(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="regular file"):
        open_source(tmp_path)


@pytest.mark.parametrize("reference", ["image:debian", "peer:host:7000"])
def test_a_kind_of_source_that_is_not_known_is_named(reference: str) -> None:
    with pytest.raises(SourceError, match="path of a memory file"):
        open_source(reference)
