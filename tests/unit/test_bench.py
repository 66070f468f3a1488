"""What a bench makes of what it measured, and what it says where a machine lacks something."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from latepage.bench import QUESTIONS, Figure, Metric
from latepage.bench import machine as machine_module
from latepage.bench.bench import Bench
from latepage.bench.best_filler import Filler, best_filler
from latepage.bench.figures import compare, error_of, hold_against, spread_of
from latepage.bench.machine import LackingError, compiler, descriptors, huge_pages, need_userfaultfd, two_cores
from latepage.bench.memory_file import cool
from latepage.bench.programs import FLAGS, Programs
from latepage.bench.restore_kvm import measure_kvm
from latepage.bench.rounds import Way, in_turns
from latepage.errors import LatepageError

P50, RATE = Metric("p50", "µs"), Metric("rate", "GB/s", "more")
LIMIT = Path(machine_module.__file__).parent / "limit"


def a_figure(**changed: object) -> Figure:
    fields: dict[str, object] = {
        "question": "faults", "way": "block", "metric": "p50", "unit": "µs", "value": 40.0, "peer": "C", "limit": 39.0,
        "ratio": 1.06, "bound": 1.05, "error": 1.02, "rounds": 5, "spread": 0.1,
    }  # fmt: skip
    return Figure(**fields | changed)  # type: ignore[arg-type]


def test_a_figure_in_json_has_all_that_is_promised() -> None:
    assert set(a_figure().to_json()) == {
        *("question", "way", "unit", "value", "peer", "limit", "ratio", "bound", "metric", "rounds", "spread", "error")
    }


def test_where_nothing_is_demanded_there_is_no_bound() -> None:
    figure = a_figure(bound=None)
    assert "bound" not in figure.to_json()
    assert figure.allowed is None
    assert figure.holds is None


def test_a_bound_is_widened_by_what_the_peer_differs_from_itself() -> None:
    assert a_figure(ratio=1.06, bound=1.05, error=1.02).holds is True
    assert a_figure(ratio=1.08, bound=1.05, error=1.02).holds is False


def test_a_ratio_is_smaller_where_we_are_better_whatever_is_measured() -> None:
    assert P50.ratio(10, 20) == RATE.ratio(20, 10) == 0.5


def test_a_ratio_is_the_median_of_the_ratios_within_rounds() -> None:
    # The second round was slow for all: it must not count as slowness of ours.
    figure = compare("faults", "block", P50, [11, 110, 11], "C", [(10, 10), (100, 100), (9, 11)], 1.1)
    assert figure.ratio == pytest.approx(1.1)
    assert (figure.value, figure.limit, figure.rounds) == (11, 10, 3)


def test_the_error_is_the_median_of_what_two_runs_of_the_peer_differ_by() -> None:
    assert error_of([(10, 12), (10, 10), (11, 10)]) == pytest.approx(1.1)
    assert error_of([(10,), (12,)]) == 1.0


def test_a_figure_beside_what_is_demanded_may_be_as_large_as_that() -> None:
    assert hold_against("handshake", "1 VM", P50, [900], "demanded", 1000).holds is True
    assert hold_against("handshake", "1 VM", P50, [1100], "demanded", 1000).holds is False
    assert hold_against("handshake", "1 VM", P50, [1100], "demanded", 1000, error=1.2).holds is True


def test_the_spread_is_between_the_quartiles() -> None:
    assert spread_of([10, 11, 12, 13, 1000]) == spread_of([10, 11, 12, 13, 14])
    assert spread_of([0, 0]) == 0


def test_peers_run_at_both_ends_of_a_round_and_ways_take_turns() -> None:
    ran: list[str] = []

    def way(name: str, *, peer: bool = False) -> Way:
        def run() -> dict[str, float]:
            ran.append(name)
            return {"p50": float(len(ran))}

        return Way(name, run, peer)

    rounds = in_turns("faults", [way("C", peer=True), way("a"), way("b")], 2)
    assert ran == ["C", "a", "b", "C", "C", "b", "a", "C"]
    assert rounds.values("C", P50) == [[1, 4], [5, 8]]
    assert rounds.each("a", P50) == [2, 7]
    assert rounds.figures("a", P50, {"C": 1.5, "not measured": 1.0}) == [rounds.figure("a", P50, "C", 1.5)]
    assert rounds.figures("left out", P50, {"C": None}) == []


def test_progress_goes_from_nothing_to_all() -> None:
    told: list[float] = []
    in_turns("faults", [Way("C", lambda: {"p50": 1.0}, peer=True)], 3, lambda share, _: told.append(share))
    assert told[0] == 0
    assert told == sorted(told)
    assert told[-1] == 1


def test_the_best_filler_is_the_fastest_and_not_one_that_was_lucky_once() -> None:
    runs: dict[Filler, int] = {}

    def run(filler: Filler) -> float:
        runs[filler] = runs.get(filler, 0) + 1
        if filler.around == 64 << 10 and not filler.same_core and not filler.chunk:
            return 1.0 if runs[filler] == 1 else 100.0
        return 10.0 if filler.around == 16 << 10 and filler.same_core else 50.0

    best = best_filler(run, random=True, cold=False, pinned=True, few=False, tell=lambda _share, _what: None)
    assert (best.around, best.same_core) == (16 << 10, True)


needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@needs_compiler
@pytest.mark.parametrize("program", sorted(path.stem for path in LIMIT.glob("*.c")))
def test_a_program_compiles_without_a_warning(program: str, tmp_path: Path) -> None:
    strict = ("-Wall", "-Wextra", "-Wconversion", "-Werror")
    subprocess.run(["cc", *FLAGS, *strict, "-o", tmp_path / program, LIMIT / f"{program}.c"], check=True)


@needs_compiler
def test_a_program_that_does_not_compile_is_lacking_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho 'no header linux/userfaultfd.h' >&2; exit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    with pytest.raises(LackingError, match=r"guest\.c cannot be compiled: no header"):
        Programs(tmp_path)["guest"]


@needs_compiler
def test_a_memory_file_has_no_zero_page_and_no_two_alike(tmp_path: Path) -> None:
    memory = Bench(tmp_path).memory_file(1 << 20)
    contents = memory.read_bytes()
    pages = {contents[at : at + 4096] for at in range(0, len(contents), 4096)}
    assert len(contents) == 1 << 20
    assert len(pages) == 256
    assert all(any(page) for page in pages)


def test_without_a_compiler_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(LackingError, match="install gcc"):
        compiler()


def test_without_a_second_core_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {3})
    with pytest.raises(LackingError, match="one core"):
        two_cores()


def test_without_userfaultfd_it_points_to_check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine_module, "DEVICE", tmp_path / "userfaultfd")
    with pytest.raises(LackingError, match="latepage check"):
        need_userfaultfd()


def test_without_kvm_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "access", lambda _path, _mode: False)
    with pytest.raises(LackingError, match="/dev/kvm"):
        measure_kvm(Bench(tmp_path), Filler(4096), {}, (), (0, 1))


@pytest.mark.parametrize("pool", ["missing", "too small"])
def test_without_a_pool_of_huge_pages_it_says_so(pool: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "nr_hugepages"
    if pool == "too small":
        # A device that takes every number and stays what it is.
        path = Path("/dev/null")
        monkeypatch.setattr(Path, "read_text", lambda _path: "0")
    monkeypatch.setattr(machine_module, "POOL", path)
    with pytest.raises(LackingError, match="2 MiB"), huge_pages(4):
        pass


def test_a_file_that_stays_in_memory_is_not_taken_for_cold() -> None:
    shared = Path("/dev/shm")  # noqa: S108 (a tmpfs is what is wanted)
    if not os.access(shared, os.W_OK):
        pytest.skip("no /dev/shm")
    memory = shared / f"latepage-test-{os.getpid()}"
    try:
        memory.write_bytes(bytes(1 << 20))
        with pytest.raises(LackingError, match="stays in memory"):
            cool(memory)
    finally:
        memory.unlink()


def test_too_few_descriptors_are_said_and_not_met_in_the_middle() -> None:
    with pytest.raises(LackingError, match="ulimit -Hn"):
        descriptors(1 << 40)


def run(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "latepage", "bench", *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, env={**os.environ, **environment})


def test_without_a_name_it_lists_what_can_be_asked() -> None:
    shown = run()
    assert shown.returncode == 0
    assert [line.split()[0] for line in shown.stdout.splitlines()] == [*QUESTIONS, "all"]


def test_without_a_compiler_the_command_ends_with_1() -> None:
    said = run("faults", "--quick", CC="no-such-compiler")
    assert said.returncode == 1
    assert "there is no C compiler (no-such-compiler)" in said.stderr


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("nonsense",), "choose one of faults"),
        (("faults", "--rounds", "0"), "from 1 to 1000"),
        (("faults", "--json", "no/such/folder.json"), "in a folder that is there"),
        (("faults", "--json", "/proc/figures.json"), "cannot be written"),
        (("faults", "--output", "/dev/null"), "no folder"),
    ],
)
def test_what_is_not_understood_ends_with_2(arguments: tuple[str, ...], why: str) -> None:
    said = run(*arguments)
    assert said.returncode == 2
    assert why in said.stderr


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_figures_become_a_picture(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from latepage.bench.drawing import draw

    figures = [a_figure(), a_figure(peer="C spinning", bound=None), a_figure(way="auto", ratio=0.0)]
    draw("faults", "how long", figures, tmp_path / f"faults.{kind}")
    assert (tmp_path / f"faults.{kind}").stat().st_size > 1000


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_rates_become_a_picture_with_a_line_for_each_way(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from latepage.bench.curves import draw_rates

    curves = {"uffd": {1: 11.0, 64: 100.0, 1024: 12.0}, "C, in the thread": {1: 160.0, 64: 290.0}, "exit": {1: 0.0, 64: 200.0}}
    path = tmp_path / f"scale.{kind}"
    draw_rates("scale", "pages a second", curves, path)
    assert path.stat().st_size > 1000
    if kind == "svg":
        assert all(f">{name}<" in path.read_text() for name in curves)


def test_names_at_the_ends_of_lines_do_not_lie_on_each_other() -> None:
    from latepage.bench.curves import _apart

    ends = [("a", "", 100.0), ("b", "", 1.0), ("c", "", 99.0)]
    names, places = _apart(ends, (1.0, 100.0))
    assert [name for name, _, _ in names] == ["b", "c", "a"]
    assert all(above - below >= 0.04 for below, above in itertools.pairwise(places))


def test_one_that_fails_does_not_keep_the_others_from_their_figures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from latepage.cli.bench import bench

    def failing(_bench: Bench) -> list[Figure]:
        raise LatepageError("it broke")

    def lacking(_bench: Bench) -> list[Figure]:
        raise LackingError("no such thing here")

    for number, name in enumerate(QUESTIONS):
        how = (failing, lacking, lambda _bench: [a_figure()])[min(number, 2)]
        monkeypatch.setattr(import_module(f"latepage.bench.{name}"), "measure", how)
    monkeypatch.setattr("latepage.cli.bench.compiler", lambda: "cc")
    assert bench("all", json=tmp_path / "figures.json") == 1
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert len(figures) == len(QUESTIONS) - 2
    said = capsys.readouterr().err
    assert "it broke" in said
    assert "left out: populate: no such thing here" in said
