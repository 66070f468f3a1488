"""Puts the tables of `latepage bench model` into docs/scaling.md, as the command printed them on the standard input.

`latepage bench model --output build | python tools/scaling_page.py`, and then build/model.svg becomes docs/images/scaling.svg.
"""

import sys
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"


def main() -> None:
    """Replaces what stands between the marks."""
    lines = "\n".join(line.rstrip() for line in sys.stdin.read().splitlines())
    beside, _, foretold = lines.partition("\nforetold:")
    foretold, found, when = foretold.partition("\nmeasured on ")
    if not found:
        sys.exit("scaling_page: this is no output of `latepage bench model`: pipe the whole of it in")
    page = PAGE.read_text()
    # Of the figures' title the column heads say enough.
    said = {
        "foretold": f"foretold:{foretold}".strip() + f"\n\nmeasured on {when}".rstrip(),
        "beside": beside.partition("\n\n")[2].strip("\n"),
    }
    for name, text in said.items():
        before, begun, rest = page.partition(f"<!-- {name} -->\n")
        _, ended, after = rest.partition("<!-- end -->")
        if not begun or not ended:
            sys.exit(f"scaling_page: {PAGE.name} has no place for this: mark one by <!-- {name} --> and <!-- end -->")
        page = f"{before}{begun}```text\n{text}\n```\n{ended}{after}"
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
