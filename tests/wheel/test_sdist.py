"""The archive of sources that `make sdist` leaves in dist/: pip builds a wheel from it, in a folder of its own."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Beside what `make` builds, never in it: cargo takes sources of the same names for the same, and would not see an edit again.
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "sdist"


@pytest.fixture(scope="module")
def sdist() -> Path:
    found = sorted((ROOT / "dist").glob("latepage-*.tar.gz"), key=lambda path: path.stat().st_mtime)
    if not found:
        pytest.skip("no sdist in dist/: make sdist")
    sources = [path for kind in ("*.rs", "*.py", "*.toml") for part in ("crates", "python") for path in (ROOT / part).rglob(kind)]
    if found[-1].stat().st_mtime < max(path.stat().st_mtime for path in sources):
        pytest.skip("the sdist in dist/ is older than the sources: make sdist")
    return found[-1]


@pytest.fixture(scope="module")
def unpacked(sdist: Path) -> Path:
    """The archive's folder, always at the same place: only what differs is written, so that cargo builds only that again."""
    place = TARGET / "sources"
    wanted: set[Path] = set()
    with tarfile.open(sdist) as archive:
        for member in archive.getmembers():
            stream = archive.extractfile(member)
            if stream is None:
                continue
            path = place / Path(*Path(member.name).parts[1:])
            wanted.add(path)
            contents = stream.read()
            if not path.exists() or path.read_bytes() != contents:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(contents)
    for path in place.rglob("*"):
        if path.is_file() and path not in wanted:
            path.unlink()
    return place


def test_the_sdist_holds_sources_the_licence_and_no_builds(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert {"LICENSE", "README.md", "Cargo.lock", "Cargo.toml", "pyproject.toml", "python/latepage/py.typed"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc")) or name.startswith(("target", "tests", ".venv"))]


def test_pip_builds_the_same_wheel_from_the_sdist(unpacked: Path, folder: Path) -> None:
    if shutil.which("cargo") is None:
        pytest.skip("no cargo")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    # The build backend is the one of this venv, so that nothing is fetched.
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [*pip, "--wheel-dir", folder, unpacked],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"CARGO_TARGET_DIR": str(TARGET / "target"), "PATH": path},
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    (made,) = (ROOT / "dist").glob("latepage-*.whl")
    with zipfile.ZipFile(built) as ours, zipfile.ZipFile(made) as theirs:
        assert sorted(ours.namelist()) == sorted(theirs.namelist())
