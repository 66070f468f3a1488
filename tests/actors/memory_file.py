"""Memory files whose every page is another."""

import random
from pathlib import Path

PAGE = 4096


def page_contents(page: int) -> bytes:
    """What page `page` of a test's memory file holds: every page differs, in its first byte from its neighbours too."""
    return bytes([page % 251 + 1]) + random.Random(page).randbytes(PAGE - 1)


def write_memory_file(path: Path, pages: int) -> Path:
    """A memory file in which every page is another, but each 16th a hole."""
    with path.open("wb") as file:
        file.truncate(pages * PAGE)
        for page in range(pages):
            if page % 16 != 15:
                file.seek(page * PAGE)
                file.write(page_contents(page))
    return path


def first_byte(page: int) -> int:
    """What a guest reads at the start of that page."""
    return 0 if page % 16 == 15 else page % 251 + 1
