"""Policies: frozen, one field per flag, refused when they make no sense."""

import dataclasses
import inspect
from typing import Any

import pytest

from latepage import LatepageError, Policy, PolicyError
from latepage.cli.serve import serve


def test_every_field_is_a_flag_of_serve_with_the_same_default() -> None:
    flags = inspect.signature(serve).parameters
    for field in dataclasses.fields(Policy):
        flag = {"allow_uids": "allow_uid"}.get(field.name, field.name)
        if field.name != "trace":  # there it is a folder
            assert tuple(flags[flag].default) == () if flag == "allow_uid" else flags[flag].default == field.default


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("populate", "later", "choose one of none, background"),
        ("on_missing", "ignore", "choose one of kill, poison"),
        ("stall_warning", 0, "seconds above zero"),
        ("handshake_timeout", -1, "seconds above zero"),
        ("stall_warning", float("nan"), "seconds above zero"),
        ("fault_around", -1, "to 1 GiB"),
        ("fault_around", 2 << 30, "to 1 GiB"),
        ("fault_around", 0, "multiple of 4 KiB"),
        ("fault_around", 4097, "multiple of 4 KiB"),
        ("placement", "core:", "core:N with the number"),
        ("placement", "core:01", "core:N with the number"),
        ("placement", "core:-1", "core:N with the number"),
        ("placement", "nowhere", "choose auto, block, spin"),
        ("placement", 5, "choose auto, block, spin"),
        ("mode", 0o7777, "permissions of a file"),
        ("allow_uids", {-2}, "no user's id"),
        ("trace", -1, "number of entries"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_with_what_would(field: str, value: Any, says: str) -> None:
    with pytest.raises(PolicyError, match=says) as refused:
        Policy(**{field: value})
    assert isinstance(refused.value, LatepageError)
    assert isinstance(refused.value, ValueError)


def test_a_policy_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Policy().mode = 0o600  # type: ignore[misc]


def test_policies_with_equal_values_are_equal_and_hash_alike() -> None:
    assert len({Policy(allow_uids=[1, 2]), Policy(allow_uids={2, 1})}) == 1
