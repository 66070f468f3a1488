"""Every Python block of every doc page runs, page by page and each on its own, in a folder with a memory file."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = [
    pytest.param(block[1], id=f"{page.relative_to(DOCS)}:{page.read_text()[: block.start()].count(chr(10)) + 1}")
    for page in sorted(DOCS.rglob("*.md"))
    for block in BLOCK.finditer(page.read_text())
]


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_of_the_docs_runs(block: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    Path("guest.mem").write_bytes(bytes(range(256)) * 4096)
    exec(compile(block, "docs", "exec"), {"__name__": "docs"})  # noqa: S102


PAGES = [*sorted(DOCS.rglob("*.md")), *sorted(DOCS.parent.glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS.parent)))
def test_every_page_that_is_linked_is_there(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


RUST = re.compile(r"^```rust\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMPILED = DOCS.parent / "examples" / "vmm" / "page.rs"


def without_form(rust: str) -> str:
    """Rust without comments, whitespace, and commas before what closes: what a formatter may change."""
    bare = re.sub(r"//.*|/\*.*?\*/|\s", "", rust)
    return re.sub(r",([)}\]])", r"\1", bare)


def test_the_rust_of_the_page_for_authors_of_vmms_is_what_compiles() -> None:
    compiled = without_form(COMPILED.read_text())
    what_you_have, *blocks = RUST.findall((DOCS / "howto" / "vmm.md").read_text())
    assert "use latepage" not in what_you_have  # not Rust but a sketch
    assert len(blocks) == 5
    for block in blocks:
        for part in re.split(r"^ *\.\.\.$", block, flags=re.MULTILINE):
            assert without_form(part) in compiled, part


COMMAND = re.compile(r"\blatepage ((?:vm|trace) [a-z]+|serve|restore|check|top|scan|bench|demo)\b((?:[^\n`|;#]|\\\n)*)")


@cache
def help_of(command: str) -> str:
    words = [sys.executable, "-m", "latepage", *command.split(), "--help"]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS.parent)))
def test_every_flag_that_a_page_gives_to_a_command_exists(page: Path) -> None:
    for command, arguments in COMMAND.findall(page.read_text()):
        for flag in re.findall(r"(?<!\S)--[a-z-]+", arguments):
            assert flag in re.findall(r"--[a-z-]+", help_of(command)), f"{page.name}: latepage {command} {flag}"
