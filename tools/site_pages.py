"""What the documentation site takes from elsewhere (a hook of mkdocs.yml).

- ``<!-- help -->`` in a page becomes the real ``--help`` of every command.
- The changelog and the notes for contributors lie in the repository's root; they become pages.
- Drawings are put into the page itself, so that they follow its light or dark scheme.
"""

import html
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from cyclopts import App
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
FROM_ROOT = ("CHANGELOG.md", "CONTRIBUTING.md")
HELP = "<!-- help -->"
DRAWING = re.compile(r'<img alt="([^"]*)" src="([^":]+\.svg)"\s*/?>')
DARK = re.compile(r"@media \(prefers-color-scheme: dark\) \{\s*(svg\.drawing) \{([^}]*)\}\s*\}")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that lie in the repository's root."""
    for name in FROM_ROOT:
        text = (ROOT / name).read_text().replace("](docs/", "](")
        files.append(File.generated(config, name.lower(), content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001 (mkdocs gives all)
    """Puts in the commands' help."""
    return markdown.replace(HELP, "\n\n".join(command_help())) if HELP in markdown else markdown


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001 (mkdocs gives all)
    """Puts drawings into the page."""
    folder = Path(page.file.src_path).parent
    return DRAWING.sub(lambda image: drawing(Path(config.docs_dir, folder, image[2]), image[1]), html)


def drawing(path: Path, says: str) -> str:
    """An SVG as a part of a page: its dark colours follow the page's scheme, not the system's."""
    svg = path.read_text()
    svg = svg[svg.index("<svg") :]
    svg = DARK.sub(r'[data-md-color-scheme="slate"] \1 {\2}', svg)
    # Markdown is through with the page: blank lines do no harm. The text is said once, by the label.
    return f'<figure class="drawing" role="img" aria-label="{html.escape(html.unescape(says))}">{svg}</figure>'


def command_help() -> Iterator[str]:
    """A section for each command, with what it prints when asked for help."""
    from latepage.cli import app

    for words in commands(app, []):
        out = subprocess.run(
            [sys.executable, "-m", "latepage", *words, "--help"],
            check=True,
            capture_output=True,
            text=True,
            env=os.environ | {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"},
        ).stdout
        lines = "\n".join(line.rstrip() for line in out.splitlines())
        yield f"{'#' * (2 + (len(words) > 1))} {' '.join(['latepage', *words])}\n\n```text\n{lines.strip()}\n```"


def commands(app: App, words: list[str]) -> Iterator[list[str]]:
    """The words of a command, and those of all below it."""
    yield words
    for name in app:
        if not name.startswith("-"):
            yield from commands(app[name], [*words, name])
