"""Shows the examples of docstrings as code on the documentation site (an extension of griffe, which reads the sources)."""

import re
from typing import Any

from griffe import Extension, Object

# A paragraph that begins with a prompt, up to the next blank line, outside of a section of its own.
EXAMPLE = re.compile(r"^(>>> .*(?:\n(?!\s*$).*)*)", re.MULTILINE)


class Doctests(Extension):
    """Puts a fence around each example."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Looks at one docstring."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(text: str) -> str:
    r"""A docstring with a fence around each of its examples.

    >>> fenced("Adds.\n\n>>> 1 + 1\n2\n\nThat is all.").splitlines()
    ['Adds.', '', '```pycon', '>>> 1 + 1', '2', '```', '', 'That is all.']
    """
    return EXAMPLE.sub(r"```pycon\n\1\n```", text)
