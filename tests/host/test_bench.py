"""Each bench runs, in tiny sizes, and leaves nothing behind. How fast anything is, no test says."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

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
    assert any("bound" in figure for figure in found)
    assert question in done.stdout
    assert list(files.iterdir()) == []
    assert processes_of(files) == []
    assert [path.name for path in pictures.iterdir()] == [f"{question}.svg"] or "no picture" in done.stderr


def test_with_one_core_the_rest_is_measured(folder: Path) -> None:
    figures = folder / "figures.json"
    words = command("faults", "--quick", "--json", figures)
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
    assert "C blocking" not in {figure["peer"] for figure in json.loads(figures.read_text())}


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
