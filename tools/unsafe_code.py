"""Fails when unsafe code, or leave to write it, stands outside a crate's ``src/sys/``."""

import re
import sys
from pathlib import Path

UNSAFE = re.compile(r"\bunsafe\s*(\{|fn|impl|trait|extern)|allow\((clippy::\w+,\s*)*unsafe_code\)")


def code(line: str) -> str:
    """The line without its comment: the word is free to use in prose."""
    return line.partition("//")[0]


def main() -> int:
    root = Path(__file__).parent.parent
    found = [
        f"{path.relative_to(root)}:{number}: {line.strip()}"
        for path in sorted(root.glob("crates/*/src/**/*.rs"))
        if "sys" not in path.relative_to(root).parts and path.name != "sys.rs"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if UNSAFE.search(code(line))
        # `pub mod sys;` is let through: the leave is given to that module alone.
    ]
    for line in found:
        print(line)
    if found:
        print("unsafe code belongs into src/sys/, behind a safe type")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
