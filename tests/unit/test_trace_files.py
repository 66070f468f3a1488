"""Trace files: what a reader gets of whole ones, of those that were cut off, and of bytes that are none."""

import os
import random
import stat
import struct
import tracemalloc
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actors.trace_files import REGION, header, record, trace_bytes, write_trace
from latepage import Pager
from latepage.errors import TraceError
from latepage.memory import Region
from latepage.observe import Recorder, Run, Trace, compare, merge, read_any, read_merged, read_trace, summarize, write_merged
from latepage.observe import trace_format as form
from latepage.observe.trace_writer import TraceWriter, encode_end

RECORDS = [
    (7, 1, "demand", 1_000),
    (8, 8, "beside", 1_000),
    (0, 7, "population", 2_000),
    (7, 2, "removed", 3_000),
    (8, 1, "cleared", 4_000),
    (200, 1, "demand", 5_000),
]
settings.register_profile("files", suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
files = settings(settings.get_profile("files"))


def test_a_whole_trace_tells_what_happened_and_how_it_ended(tmp_path: Path) -> None:
    trace = read_trace(write_trace(tmp_path / "a.trace", RECORDS))
    assert (trace.vm, trace.source, trace.started, trace.pages, trace.size) == ("vm-7", "guest.mem", 1e9, 256, 1 << 20)
    assert (trace.whole, trace.end, trace.seconds, trace.lost) == (True, "gone", 2.5, 0)
    assert (trace.counters["faults"], trace.latency["p50"]) == (6, 1e-6)
    assert trace.readable == (tmp_path / "a.trace").stat().st_size
    assert list(trace.runs())[:2] == [Run(7, 1, "demand", 1e-6), Run(8, 8, "beside", 1e-6)]


def test_only_touches_are_the_working_set(tmp_path: Path) -> None:
    trace = read_trace(write_trace(tmp_path / "a.trace", RECORDS))
    assert trace.touches() == {7: 1e-6, 200: 5e-6}
    summary = summarize(trace, percent=50)
    assert (summary.touched, summary.touched_bytes, summary.beside, summary.populated) == (2, 8192, 8, 7)
    assert (summary.removed, summary.cleared, summary.seconds_to_percent) == (2, 1, 1e-6)


def test_what_was_lost_is_counted(tmp_path: Path) -> None:
    assert read_trace(write_trace(tmp_path / "a.trace", RECORDS, lost=134_464)).lost == 134_464


@pytest.mark.parametrize("kept", range(0, 16 * (len(RECORDS) + 1), 5))
def test_a_trace_that_was_cut_off_is_read_up_to_its_last_whole_record(tmp_path: Path, kept: int) -> None:
    front = len(header())
    path = tmp_path / "a.trace.part"
    path.write_bytes(trace_bytes(RECORDS)[: front + kept])
    trace = read_trace(path)
    assert (trace.whole, trace.end, trace.readable) == (False, None, front + kept // 16 * 16)
    assert len(list(trace.runs())) == min(len(RECORDS), kept // 16)


def test_an_end_mark_that_was_cut_off_is_none(tmp_path: Path) -> None:
    data = trace_bytes(RECORDS)
    path = tmp_path / "a.trace"
    for end in range(len(header()) + 16 * len(RECORDS), len(data)):
        path.write_bytes(data[:end])
        trace = read_trace(path)
        assert (trace.whole, len(list(trace.runs()))) == (False, len(RECORDS))


def test_space_that_was_never_written_to_ends_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "a.trace"
    data = trace_bytes(RECORDS, end=False)
    path.write_bytes(data + bytes(4096))
    assert (read_trace(path).whole, read_trace(path).readable) == (False, len(data))


FRONT = len(header())
BAD = {
    "empty": (b"", "byte 0: the file is empty"),
    "text": (b'{"vm": "vm-7"}\n' * 9, "byte 0: not a trace file"),
    "newlines changed": (trace_bytes(RECORDS).replace(b"\r\n", b"\n"), "byte 0: not a trace file"),
    "another version": (form.MAGIC + struct.pack("<HHI", 7, 1, 0) + bytes(99), "byte 8: its format has version 7"),
    "another kind": (form.MAGIC + struct.pack("<HHI", 1, 9, 0) + bytes(99), "byte 10: it is of kind 9"),
    "huge header": (form.MAGIC + struct.pack("<HHI", 1, 1, 0xFFFFFFFF), "byte 12: damaged: a header of 4,294,967,295 bytes"),
    "cut in the header": (header()[:40], "byte 40: the file ends inside its header"),
    "header of a byte changed": (header().replace(b"vm-7", b"vm-8"), "byte 16: damaged: the header is not the one"),
    "no regions": (form.header(1, {"vm": "x"}), "byte 16: its header makes no sense: it has no regions"),
    "odd region": (header(regions=(replace(REGION, size=4095),)), "a region of 4095 bytes in pages of 4096"),
    "too many pages": (header(regions=(replace(REGION, size=1 << 60),)), "more pages than there can be"),
    "page out of range": (header() + record(250, 7, "beside", 1), f"byte {FRONT}: damaged: page 256 of a VM that has 256"),
    "unknown record": (header() + form.RECORD.pack(1, 99 << 24, 1), f"byte {FRONT}: damaged: a record of a kind (99)"),
    "wide touch": (header() + form.RECORD.pack(1, 1 << 24 | 1, 1), "a touch of several pages"),
    "wrong count": (trace_bytes(RECORDS)[:FRONT] + trace_bytes(RECORDS)[FRONT + 16 :], "an end mark for 6 records after 5"),
    "a record changed": (trace_bytes(RECORDS).replace(record(*RECORDS[5]), record(201, 1, "demand", 5)), "checksum of the whole"),
    "goes on": (trace_bytes(RECORDS) + b"!", "it goes on after its end mark"),
}


@pytest.mark.parametrize(("data", "says"), BAD.values(), ids=BAD)
def test_what_is_no_trace_is_refused_with_its_name_and_the_byte(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "bad.trace"
    path.write_bytes(data)
    with pytest.raises(TraceError) as refused:
        read_any(path)
    assert str(refused.value).startswith(f"{path}: byte ")
    assert says in str(refused.value)


@pytest.mark.parametrize("name", ["missing", "folder", "/dev/zero"])
def test_what_is_no_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(TraceError, match=name):
        read_any(tmp_path / name)


def readable(path: Path, data: bytes) -> None:
    """Any bytes give a trace or a clear error, and take no more memory than such a file has."""
    path.write_bytes(data)
    tracemalloc.start()
    try:
        said = ""
        try:
            found = read_any(path)
        except TraceError as error:
            said = str(error)
        else:
            if isinstance(found, Trace):
                summary = summarize(found)
                assert summary.touched * 16 <= len(data)
                assert summary.vm.isprintable()
            else:
                found.ranges()
        assert not said or said.startswith(f"{path}: byte ")
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 4 << 20


@files
@given(st.binary(max_size=300))
def test_any_bytes_are_refused_in_words(tmp_path: Path, data: bytes) -> None:
    readable(tmp_path / "x.trace", data)


@files
@given(
    kind=st.sampled_from([1, 2, 3]),
    text=st.binary(max_size=60) | st.text(max_size=60).map(str.encode),
    rest=st.binary(max_size=99),
)
def test_any_header_with_a_right_checksum_is_read_or_refused_in_words(
    tmp_path: Path, kind: int, text: bytes, rest: bytes
) -> None:
    front = form.FRONT.pack(form.MAGIC, 1, kind, len(text)) + text
    readable(tmp_path / "x.trace", front + form.CHECKSUM.pack(zlib.crc32(front)) + rest)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)
field_names = ["vm", "source", "started", "populate", "fault_around", "counters", "latency", "seconds", "end", "merged"]
field_values = st.dictionaries(st.sampled_from(field_names), json_values)
numbers = st.integers(0, 1 << 64) | st.sampled_from([0, 4096, 1 << 20, 2 << 20, 1 << 40])
region_values = st.fixed_dictionaries(dict.fromkeys(("hva", "size", "offset", "page_size"), numbers))


@files
@given(
    kind=st.sampled_from([1, 2]), fields=field_values, regions=st.lists(region_values, max_size=3), end=st.none() | field_values
)
def test_any_fields_are_read_or_refused_in_words(
    tmp_path: Path, kind: int, fields: dict[str, object], regions: list[dict[str, int]], end: dict[str, object] | None
) -> None:
    usual = form.regions_as_json((REGION,))
    data = form.header(kind, fields | {"regions": regions or usual})
    if end is not None:
        data += encode_end(end, 0, zlib.crc32(data))
    readable(tmp_path / "x.trace", data)


@files
@given(st.data())
def test_a_trace_with_changed_bytes_is_read_or_refused_in_words(tmp_path: Path, data: st.DataObject) -> None:
    contents = bytearray(trace_bytes(RECORDS, end=data.draw(st.booleans())))
    for _ in range(data.draw(st.integers(1, 4))):
        contents[data.draw(st.integers(0, len(contents) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(contents)))
    readable(tmp_path / "x.trace", bytes(contents[:cut] if data.draw(st.booleans()) else contents))


def test_a_small_file_about_endless_memory_takes_little(tmp_path: Path) -> None:
    region = replace(REGION, size=((1 << 32) - 1) * 4096)
    wide = form.RECORD.pack(0, 3 << 24 | 0xFFFFFF, 1)
    readable(tmp_path / "x.trace", header(regions=(region,)) + wide * 1000)


def test_names_that_steer_a_terminal_are_read_without_their_commands(tmp_path: Path) -> None:
    assert read_trace(write_trace(tmp_path / "a.trace", [], vm="\x1b[2Jvm\n")).vm == "?[2Jvm?"


def test_merging_gives_the_order_of_earliest_touches_and_counts_runs(tmp_path: Path) -> None:
    a = read_trace(write_trace(tmp_path / "a", [(5, 1, "demand", 10), (9, 1, "demand", 30), (6, 3, "beside", 10)], vm="a"))
    b = read_trace(write_trace(tmp_path / "b", [(9, 1, "demand", 20), (4, 1, "demand", 40), (3, 1, "cleared", 1)], vm="b"))
    merged = merge([a, b])
    assert list(merged.pages) == [5, 9, 4]
    assert list(merged.touched_by) == [1, 2, 1]
    assert list(merge([a, b], min_runs=2).pages) == [9]
    write_merged(tmp_path / "m", merged)
    again = read_merged(tmp_path / "m")
    assert (list(again.pages), list(again.touched_by), list(again.seconds)) == ([5, 9, 4], [1, 2, 1], [0, 0, 2e-8])
    assert again.merged == (("a", 1e9), ("b", 1e9))
    assert again.ranges() == [(5 * 4096, 4096), (9 * 4096, 4096), (4 * 4096, 4096)]


@pytest.fixture
def generous_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("generous_umask")
def test_what_a_guest_touched_is_its_owners_affair(tmp_path: Path) -> None:
    folder = tmp_path / "traces"
    with Pager() as pager, Recorder(pager, folder):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    writer = TraceWriter(folder, "vm-7", {"regions": form.regions_as_json((REGION,))})
    growing = stat.S_IMODE(writer.path.stat().st_mode)
    writer.finish({})
    assert (growing, stat.S_IMODE(writer.path.stat().st_mode)) == (0o600, 0o600)
    write_merged(folder / "m", merge([read_trace(writer.path)]))
    assert stat.S_IMODE((folder / "m").stat().st_mode) == 0o600


def test_a_run_that_began_late_is_merged_as_if_it_had_not(tmp_path: Path) -> None:
    late = 370_000_000_000
    records = [(5, 1, "demand", 10), (9, 1, "demand", 30), (4, 1, "demand", 50)]
    a = read_trace(write_trace(tmp_path / "a", records))
    b = read_trace(write_trace(tmp_path / "b", [(7, 1, "demand", late + 10), (8, 1, "demand", late + 20)]))
    assert list(merge([a, b]).pages) == [5, 7, 8, 9, 4]


def verified(tmp_path: Path, name: str, order: list[int], around: int) -> Trace:
    """A guest that touched every page in that order, with a window of so many pages around each: what its pager records."""
    records, there = [], set[int]()
    for ns, page in enumerate(order):
        if page not in there:
            window_end = (page // around + 1) * around
            beside = next((other for other in range(page + 1, window_end) if other in there), window_end)
            records.append((page, 1, "demand", ns))
            if beside > page + 1:
                records.append((page + 1, beside - page - 1, "beside", ns))
            there.update(range(page, beside))
    return read_trace(write_trace(tmp_path / name, records, fault_around=around * 4096))


def test_two_guests_that_touched_everything_overlap_in_everything_whatever_fault_around_hid(tmp_path: Path) -> None:
    pages = list(range(256))
    shuffled = random.Random(7).sample(pages, len(pages))
    a, b = verified(tmp_path, "a", pages, 16), verified(tmp_path, "b", shuffled, 4)
    assert set(a.touches()) < set(b.touches()) < set(pages), "both traces lack touches"
    difference = compare(a, b)
    assert (difference.granule, difference.unit, difference.jaccard) == (65536, "stretches of 64 KiB", 1.0)
    assert difference.both == tuple(range(first, first + 16) for first in range(0, 256, 16))
    assert (difference.only_a, difference.only_b, difference.populated) == ((), (), False)
    assert compare(a, verified(tmp_path, "c", pages[::-1], 16)).order == -1.0
    assert merge([a, b]).granule == 65536


def test_stretches_are_those_of_the_snapshot_and_end_with_their_region(tmp_path: Path) -> None:
    regions = (replace(REGION, size=10 * 4096, offset=12 * 4096), replace(REGION, gpa=1 << 32, size=6 * 4096, offset=32 * 4096))
    records = [(3, 1, "demand", 1), (4, 1, "demand", 2), (9, 1, "demand", 3), (10, 1, "demand", 4)]
    a = read_trace(write_trace(tmp_path / "a", records, regions=regions, fault_around=16 * 4096))
    assert compare(a, a).both == (range(4), range(4, 10), range(10, 16))
    b = read_trace(write_trace(tmp_path / "b", records, regions=regions, fault_around=12 * 4096))
    assert compare(a, b).granule == 48 * 4096, "whole windows of both"


def test_what_population_hid_is_told(tmp_path: Path) -> None:
    a = read_trace(write_trace(tmp_path / "a", [(5, 1, "demand", 10)]))
    b = read_trace(write_trace(tmp_path / "b", [(5, 1, "demand", 10), (8, 9, "population", 11)]))
    assert (compare(a, a).populated, compare(a, b).populated) == (False, True)
    write_merged(tmp_path / "m", merge([a, b]))
    again = read_merged(tmp_path / "m")
    assert (again.populated, again.granule) == (True, 4096)


def test_a_merged_trace_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    write_merged(tmp_path / "m", merge([read_trace(write_trace(tmp_path / "a", RECORDS))]))
    data = (tmp_path / "m").read_bytes()
    for end in range(len(data)):
        (tmp_path / "m").write_bytes(data[:end])
        with pytest.raises(TraceError, match="m: byte "):
            read_merged(tmp_path / "m")


def test_each_kind_is_refused_where_the_other_is_wanted(tmp_path: Path) -> None:
    write_merged(tmp_path / "m", merge([read_trace(write_trace(tmp_path / "a", RECORDS))]))
    with pytest.raises(TraceError, match="made of several traces"):
        read_trace(tmp_path / "m")
    with pytest.raises(TraceError, match="the trace of one VM"):
        read_merged(tmp_path / "a")


OTHERS = {
    "regions": (REGION, replace(REGION, hva=0, offset=1 << 20, gpa=1 << 32)),
    "size": (replace(REGION, size=2 << 20),),
    "page_size": (replace(REGION, size=2 << 20, page_size=2 << 20),),
    "offset": (replace(REGION, offset=4096),),
    "guest-physical address": (replace(REGION, gpa=4096),),
}


@pytest.mark.parametrize(("what", "regions"), OTHERS.items(), ids=OTHERS)
def test_traces_whose_pages_are_not_the_same_ones_are_not_merged(tmp_path: Path, what: str, regions: tuple[Region, ...]) -> None:
    a = read_trace(write_trace(tmp_path / "a", []))
    b = read_trace(write_trace(tmp_path / "b", [], regions=regions))
    with pytest.raises(TraceError, match=f"b does not fit .*a: .*{what if what != 'page_size' else 'size'}"):
        merge([a, b])


def test_addresses_in_the_vmms_process_may_differ(tmp_path: Path) -> None:
    a = read_trace(write_trace(tmp_path / "a", []))
    b = read_trace(write_trace(tmp_path / "b", [], regions=(replace(REGION, hva=4096, gpa=None),)))
    assert len(merge([a, b]).pages) == 0
