"""Events: each kind has a name of its own, and nothing of the engine's description gets lost."""

import dataclasses

from latepage import events
from latepage.events import Event, from_engine


def test_every_kind_has_a_name_of_its_own_and_is_public() -> None:
    kinds = Event.__subclasses__()
    assert len({kind.event for kind in kinds}) == len(kinds)
    assert {kind.__name__ for kind in kinds} <= set(events.__all__)


def test_every_kind_comes_back_from_its_description() -> None:
    for kind in Event.__subclasses__():
        values = {field.name: 1.5 if field.name == "at" else "x" for field in dataclasses.fields(kind)}
        event = from_engine({"event": kind.event, **values})
        assert type(event) is kind
        assert event.as_dict() == {"event": kind.event, **values}
