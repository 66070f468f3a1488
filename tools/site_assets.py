"""Fails when a page of the built site would load anything from elsewhere: a script, a style, a font, a picture, a frame."""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

# What a browser fetches by itself; a link that the reader follows is none of these.
FETCHED = {
    "script": "src",
    "link": "href",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
    "object": "data",
    "embed": "src",
    "use": "href",
}
NOT_FETCHED = {"canonical", "next", "prev", "alternate"}  # links that only say what belongs together
REMOTE = re.compile(r"(?:https?:)?//", re.IGNORECASE)
IN_STYLE = re.compile(r"""(?:url\(|@import)\s*["']?\s*((?:https?:)?//[^"')\s]+)""", re.IGNORECASE)


class Fetched(HTMLParser):
    """Collects what a page fetches from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Looks at one element."""
        given = {name: value or "" for name, value in attrs}
        address = given.get(FETCHED.get(tag, ""), "")
        if REMOTE.match(address) and not (tag == "link" and given.get("rel") in NOT_FETCHED):
            self.found.append(f"<{tag}> {address}")
        self.found += IN_STYLE.findall(given.get("style", ""))


def fetched(text: str) -> list[str]:
    """Addresses elsewhere that a page fetches.

    >>> fetched('<script src="https://cdn.example/a.js"></script><a href="https://example.org">read</a><img src="a.png">')
    ['<script> https://cdn.example/a.js']
    >>> fetched('<style>@import "//fonts.example/b.css"; .a { background: url(c.png) }</style>')
    ['//fonts.example/b.css']
    """
    page = Fetched()
    page.feed(text)
    styles = re.findall(r"<style.*?</style>", text, re.DOTALL)
    return page.found + [address for style in styles for address in IN_STYLE.findall(style)]


def main(site: Path) -> int:
    pages = sorted(site.rglob("*.html"))
    found = [f"{path}: {what}" for path in pages for what in fetched(path.read_text())]
    found += [f"{path}: {what}" for path in sorted(site.rglob("*.css")) for what in IN_STYLE.findall(path.read_text())]
    for line in found:
        print(line)
    if not pages:
        print(f"no pages in {site}")
    elif not found:
        print(f"site: {len(pages)} pages load nothing from elsewhere: open {site}/index.html")
    return bool(found) or not pages


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
