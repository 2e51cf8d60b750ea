"""Examples in docstrings as the reference shows them: what begins with `>>>` is a section of examples."""

import re
from typing import Any

import griffe


class Doctests(griffe.Extension):
    """Gives doctests the heading that griffe's parser looks for."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Change the docstring of an object that was just read."""
        if obj.docstring is not None:
            text = re.sub(r'^Example:$', 'Examples:', obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r'\n\n(?=>>> )(.*)\Z', _as_section, text, flags=re.DOTALL)


def _as_section(match: re.Match[str]) -> str:
    return '\n\nExamples:\n' + re.sub(r'^(?=.)', '    ', match[1], flags=re.MULTILINE)
