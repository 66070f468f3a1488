"""`latepage trace`: tables, figures and pictures of traces, and how it says no."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from actors.trace_files import REGION, trace_bytes, write_trace
from latepage.cli import trace as command
from latepage.memory import Region
from latepage.observe import read_merged

RECORDS = [
    (7, 1, "demand", 1_000_000),
    (8, 8, "beside", 1_000_000),
    (0, 7, "population", 2_000_000),
    (7, 2, "removed", 3_000_000),
    (8, 1, "cleared", 4_000_000),
    (200, 1, "demand", 5_000_000),
    (100, 1, "demand", 6_000_000),
]
OTHER = [(200, 1, "demand", 500_000), (7, 1, "demand", 700_000), (30, 1, "demand", 800_000)]


def run(*arguments: object) -> "subprocess.CompletedProcess[str]":
    line = [sys.executable, "-m", "latepage", "trace", *map(str, arguments)]
    return subprocess.run(line, check=False, capture_output=True, text=True, timeout=60)


@pytest.fixture
def a(tmp_path: Path) -> Path:
    return write_trace(tmp_path / "a.trace", RECORDS, vm="vm-a")


@pytest.fixture
def b(tmp_path: Path) -> Path:
    return write_trace(tmp_path / "b.trace", OTHER, vm="vm-b")


@pytest.mark.parametrize("name", ["show", "diff", "merge"])
def test_every_command_has_help(name: str) -> None:
    assert run(name, "--help").returncode == 0


def test_show_gives_a_row_for_each_trace(a: Path, b: Path) -> None:
    shown = run("show", a, b)
    assert (shown.returncode, shown.stderr) == (0, "")
    row = next(line for line in shown.stdout.splitlines() if line.startswith(" vm-a"))
    assert row.split() == ["vm-a", "256", "3", "8", "7", "2", "6.0", "ms", "2.50", "s", "0"]
    assert "vm-b" in shown.stdout
    assert "beside or ahead" in shown.stdout
    assert all(len(line) <= 80 for line in shown.stdout.splitlines())


def test_show_gives_figures_as_json(a: Path) -> None:
    (figures,) = json.loads(run("show", a, "--json", "--percent", "50").stdout)
    expected: dict[str, Any] = {
        "kind": "trace",
        "file": str(a),
        "vm": "vm-a",
        "pages": 256,
        "touched": 3,
        "touched_bytes": 3 * 4096,
        "beside": 8,
        "populated": 7,
        "removed": 2,
        "cleared": 1,
        "percent": 50,
        "seconds_to_percent": 0.005,
        "seconds": 2.5,
        "lost": 0,
        "whole": True,
        "end": "gone",
    }
    assert {name: figures[name] for name in expected} == expected


def test_show_says_what_is_missing_of_a_trace(tmp_path: Path) -> None:
    part = write_trace(tmp_path / "cut.trace.part", RECORDS, end=False)
    lost = write_trace(tmp_path / "lost.trace", RECORDS, lost=1234)
    shown = run("show", part, lost)
    assert shown.returncode == 0
    assert f"{part}: not whole: it has no end mark" in shown.stdout
    assert f"read up to byte {part.stat().st_size:,}" in shown.stdout
    assert f"{lost}: 1,234 entries came faster than they could be recorded" in shown.stdout


def test_show_names_the_bad_file_and_the_byte_and_shows_the_others(a: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.trace"
    bad.write_bytes(trace_bytes(RECORDS)[:30])
    shown = run("show", bad, a, tmp_path / "none.trace")
    assert shown.returncode == 1
    assert "vm-a" in shown.stdout
    assert f"latepage: {bad}: byte 30: the file ends inside its header" in shown.stderr
    assert "none.trace: No such file or directory" in shown.stderr
    assert "Traceback" not in shown.stderr


def test_diff_tells_the_overlap_and_the_order(a: Path, b: Path) -> None:
    figures = json.loads(run("diff", a, b, "--json").stdout)
    assert {name: figures[name] for name in ("both", "only_a", "only_b", "jaccard", "order")} == {
        "both": 2,
        "only_a": 1,
        "only_b": 1,
        "jaccard": 0.5,
        "order": -1.0,
    }
    shown = run("diff", a, b).stdout
    assert "overlap (Jaccard): 50.0%" in shown
    assert "-1.00" in shown


def test_diff_and_merge_say_what_does_not_show(a: Path, tmp_path: Path) -> None:
    wide = write_trace(tmp_path / "wide.trace", OTHER, fault_around=65536)
    figures = json.loads(run("diff", a, wide, "--json").stdout)
    assert (figures["granule"], figures["populated"], figures["both"], figures["only_b"]) == (65536, True, 2, 1)
    said = " ".join(run("diff", a, wide).stdout.split())
    assert "stretches of 64 KiB that either touched" in said
    assert "later touches of it do not show" in said
    assert "population brought pages ahead of the guest" in said
    merged = tmp_path / "m"
    for shown in (run("merge", a, wide, "--output", merged), run("show", merged)):
        assert "later touches of that do not show" in shown.stdout
        assert "population brought pages ahead of the guest" in shown.stdout
    (figures,) = json.loads(run("show", merged, "--json").stdout)
    assert (figures["granule"], figures["populated"]) == (65536, True)
    plain = run("diff", wide, wide, "--json"), run("diff", *[write_trace(tmp_path / "plain.trace", OTHER)] * 2)
    assert json.loads(plain[0].stdout)["populated"] is False
    assert "do not show" not in plain[1].stdout


def test_diff_of_what_does_not_fit_names_both_files(a: Path, tmp_path: Path) -> None:
    other = write_trace(tmp_path / "other.trace", [], regions=(Region(0, 0, 2 << 20, 0, 4096),))
    said = run("diff", a, other)
    assert said.returncode == 1
    assert f"{other} does not fit {a}: region 0 has a size of 0x200000, not {REGION.size:#x}" in said.stderr


def test_merge_writes_one_order_and_show_shows_it(a: Path, b: Path, tmp_path: Path) -> None:
    merged = tmp_path / "boot.merged"
    said = run("merge", a, b, "--output", merged)
    assert (said.returncode, said.stderr) == (0, "")
    assert "4 pages (16 KiB) that 2 runs were seen to touch: vm-a, vm-b" in said.stdout
    assert "2 by 2 of them" in said.stdout
    assert list(read_merged(merged).pages) == [7, 200, 30, 100]
    (figures,) = json.loads(run("show", merged, "--json").stdout)
    assert (figures["touched"], figures["touched_by"]) == (4, {"1": 2, "2": 2})
    assert "that 2 runs were seen to touch" in run("show", merged).stdout


def test_a_merge_that_fails_leaves_nothing_behind(a: Path, tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(b"x")
    before = sorted(tmp_path.iterdir())
    assert run("merge", a, tmp_path / "bad", "--output", tmp_path / "out").returncode == 1
    assert run("merge", "--output", tmp_path / "out").returncode == 2
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_pictures_are_drawn(a: Path, b: Path, tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    part = write_trace(tmp_path / "cut.part", [], end=False, vm="$\\frac{ \u4f60")
    start = {".png": b"\x89PNG\r\n\x1a\n", ".svg": b"<?xml"}[suffix]
    pictures = [tmp_path / f"{name}{suffix}" for name in ("one", "three", "empty", "diff")]
    for picture, files in zip(pictures, ([a], [a, b, part], [part], None), strict=True):
        said = run("show", *files, "--output", picture) if files else run("diff", a, b, "--output", picture)
        assert (said.returncode, said.stderr) == (0, "")
        assert picture.read_bytes().startswith(start)
        assert f"drawn: {picture}" in said.stdout
    assert sorted(tmp_path.iterdir()) == sorted([a, b, part, *pictures])


def test_a_picture_that_fails_leaves_nothing_behind(a: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from latepage.errors import TraceError
    from latepage.observe.picture import picture

    def fails(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with (
        pytest.raises(TraceError, match=r"out.png: cannot be written: No space left"),
        picture(tmp_path / "out.png", 4, 3) as figure,
    ):
        monkeypatch.setattr(figure, "savefig", fails)
    assert list(tmp_path.iterdir()) == [a]


def test_without_matplotlib_a_picture_says_what_to_install(
    a: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from latepage.errors import LatepageError

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(LatepageError, match=r"install latepage with its extra, latepage\[plot\]"):
        command.show(a, output=tmp_path / "x.png")
    assert "vm-a" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [a]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("show",), "no file is named"),
        (("show", "{}/a.trace", "--percent", "0"), "--percent is 0"),
        (("show", "{}/a.trace", "--output", "{}/x.gif"), ".png or .svg"),
        (("show", "{}/a.trace", "--output", "{}/none/x.png"), "make it first"),
        (("diff", "{}/a.trace", "{}/a.trace", "--output", "{}/x"), ".png or .svg"),
        (("merge", "{}/a.trace", "--output", "{}/a.trace"), "that is one of the traces"),
        (("merge", "{}/a.trace", "--output", "{}"), "is a folder"),
        (("merge", "{}/a.trace", "--output", "{}/m", "--min-runs", "2"), "--min-runs is 2"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_what_cannot_work_is_refused_before_anything_is_made(a: Path, arguments: tuple[str, ...], says: str) -> None:
    said = run(*(argument.replace("{}", str(a.parent)) for argument in arguments))
    assert said.returncode == 2
    assert says in said.stderr
    assert list(a.parent.iterdir()) == [a]
