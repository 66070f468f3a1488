"""docs/check.md lists the keys that `latepage check --json` prints: all of them, and no other."""

import re
from pathlib import Path

import pytest

from latepage.check import check_host
from latepage.check.deliveries import DELIVERIES
from latepage.check.holders import Holder, Search
from latepage.check.items import Need, State
from latepage.check.proc import Descriptor, Region, Status, Thread
from latepage.check.verdict import Verdict
from latepage.check.vm import VmReport

DOCS = Path(__file__).parents[2] / "docs" / "check.md"


def documented(heading: str) -> list[str]:
    """The first column of the table under that heading."""
    text = DOCS.read_text()
    section = text[text.index(f"\n### {heading}\n") + len(heading) + 5 :]
    section = re.split(r"^#", section, maxsplit=1, flags=re.MULTILINE)[0]
    return re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)


@pytest.fixture(scope="module")
def report() -> dict[str, object]:
    return check_host("0:0").as_dict()


def test_every_item_is_documented_in_its_order(report: dict[str, object]) -> None:
    items = report["items"]
    assert isinstance(items, dict)
    assert documented("Items") == list(items)


def test_every_key_of_the_report_is_documented(report: dict[str, object]) -> None:
    assert documented("The report") == list(report)


def test_every_key_of_an_item_and_of_a_delivery_is_documented(report: dict[str, object]) -> None:
    items, deliveries = report["items"], report["deliveries"]
    assert isinstance(items, dict)
    assert isinstance(deliveries, dict)
    assert {tuple(item) for item in items.values()} == {tuple(documented("An item"))}
    assert {tuple(delivery) for delivery in deliveries.values()} == {tuple(documented("A delivery"))}
    assert list(deliveries) == list(DELIVERIES)


def test_every_word_that_a_key_may_hold_is_documented() -> None:
    text = DOCS.read_text()
    for word in (*State.__args__, *Need.__args__, *Verdict.__args__):  # type: ignore[attr-defined]
        assert f"`{word}`" in text, word


def test_every_key_of_a_vm_is_documented() -> None:
    process = Status(1, "a", "a", "S", 0, False)
    said = VmReport(
        process=process,
        verdict="served",
        says="",
        todo=None,
        userfaultfds=(Descriptor(5, 1, 0, 0, 8),),
        holders=Search((Holder(process, 9, 5, False),), (), "kcmp").holders,
        regions=(Region(0, 4096, 0, 4096, ("missing",), ""),),
        waiting=(Thread(1, "a", "page", 0),),
        stuck=(),
        looked=0.0,
        unseen=(),
        kvm=True,
    ).as_dict()
    keys = []
    for key, value in said.items():
        keys.append(key)
        if isinstance(value, list) and value:
            keys += [f"{key}[].{inner}" for inner in value[0]]
    keys.insert(keys.index("userfaultfds[].holders") + 1, "userfaultfds[].holders[]")
    assert documented("A VM") == keys
    assert set(said["userfaultfds"][0]["holders"][0]) == {"pid", "fd", "command", "uid", "state"}
