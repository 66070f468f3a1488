"""Each bench runs, in tiny sizes, and leaves nothing behind. How fast anything is, no test says."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from actors.serve import Serve
from latepage.bench import QUESTIONS

pytestmark = [
    pytest.mark.needs("/dev/userfaultfd"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler"),
]

PROMISED = {"question", "way", "unit", "value", "peer", "limit", "ratio", "metric", "rounds", "spread", "error"}


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "latepage", "bench", *map(str, arguments)]


def processes_of(folder: Path) -> list[str]:
    """The command lines of processes that have to do with a folder."""
    found = []
    for each in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = each.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has ended
            continue
        if str(folder) in line and f"/{os.getpid()}/" not in str(each):
            found.append(line)
    return found


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_bench_runs_and_leaves_nothing_behind(question: str, folder: Path) -> None:
    figures, pictures, files = folder / "figures.json", folder / "pictures", folder / "tmp"
    files.mkdir()
    words = command(question, "--quick", "--json", figures, "--output", pictures)
    done = subprocess.run(
        words, check=False, capture_output=True, text=True, timeout=300, env={**os.environ, "TMPDIR": str(files)}
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())
    assert found
    for figure in found:
        assert set(figure) - {"bound"} == PROMISED
        assert figure["question"] == question
        assert figure["rounds"] >= 1
        assert figure["error"] >= 1
        assert figure["ratio"] >= 0
    keys = [(figure["question"], figure["way"], figure["metric"], figure["peer"]) for figure in found]
    assert len(set(keys)) == len(keys)
    bounds = sum("bound" in figure for figure in found)
    assert bounds > 0
    # Nothing of a line is lost where stdout is no terminal.
    assert sum(line.rstrip().endswith(("holds", "over")) for line in done.stdout.splitlines()) == bounds
    assert question in done.stdout
    assert list(files.iterdir()) == []
    assert processes_of(files) == []
    assert [path.name for path in pictures.iterdir()] == [f"{question}.svg"] or "no picture" in done.stderr


@pytest.mark.parametrize("question", ["faults", "scale", "model"])
def test_with_one_core_the_rest_is_measured(question: str, folder: Path) -> None:
    figures = folder / "figures.json"
    words = command(question, "--quick", "--json", figures)
    done = subprocess.run(
        words,
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}),
    )
    assert done.returncode == 0, done.stderr
    assert "there is one core only" in done.stderr
    found = json.loads(figures.read_text())
    assert found
    # Nothing that takes another core: a peer, a way, or a host that is foretold.
    assert not [figure for figure in found if figure["peer"] == "C blocking" or "other core" in figure["way"]]
    rows = [line.split() for line in done.stdout.partition("foretold:")[2].splitlines()]
    # Of the rows of numbers, those that begin a host have one more.
    numbers = [row for row in rows if row and row[0].isdigit()]
    assert [row[0] for row in numbers if len(row) == max(map(len, numbers))] == ["1"] * (question == "model")


def test_a_crowd_whose_pager_refuses_it_ends_and_says_so(folder: Path) -> None:
    (folder / "guest.mem").write_bytes(bytes(8 * 4096))
    asked = {"delivery": "notify", "threads": 2, "pages": 16, "touches": 16, "socket": str(folder / "late.sock")}
    with Serve(folder / "late.sock", folder / "guest.mem") as serve:
        serve.event("listening")
        words = [sys.executable, "-m", "latepage.bench.crowd", json.dumps(asked)]
        done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGBUS
    assert "the pager closed the connection" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_bench_that_is_ended_leaves_nothing_behind(number: signal.Signals, folder: Path) -> None:
    words = command("handshake", "--rounds", "1000")
    with subprocess.Popen(
        words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env={**os.environ, "TMPDIR": str(folder)}
    ) as bench:
        sockets: list[Path] = []
        while len(sockets) < 3:  # the C program's, and those of both pagers
            assert bench.poll() is None
            sockets = list(folder.glob("*/*.sock"))
        bench.send_signal(number)
        bench.communicate(timeout=60)
    assert bench.returncode == 128 + number
    assert list(folder.iterdir()) == []
    assert processes_of(folder) == []
