"""Code blocks and links of the pages for users: README.md and docs/."""

import re
import shlex
import textwrap
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]

FENCE = re.compile(r'^( *)```(\w*)[^\n]*\n(.*?)^\1```$', re.DOTALL | re.MULTILINE)
LINK = re.compile(r'\]\(([^)\s]+)\)')
RUN = ('python', 'shell')
SHOWN = ('text', 'yaml', 'json', 'bibtex', 'math')  # nothing to run


class Block(NamedTuple):
    """Code of a page: its language, the line of the page that it begins on, and its text."""

    language: str
    line: int
    text: str


def list_pages():
    """Return the names of all pages, as paths from the repository's root."""
    return ['README.md', *sorted(str(path.relative_to(ROOT)) for path in (ROOT / 'docs').rglob('*.md'))]


def read_blocks(name):
    """Return the blocks of a page, those that only show something among them."""
    text = (ROOT / name).read_text()
    return [
        Block(match[2], text.count('\n', 0, match.start()) + 2, textwrap.dedent(match[3]))
        for match in FENCE.finditer(text)
    ]


def read_links(name):
    """Return the targets of a page's links outside its code, without those of other hosts."""
    text = FENCE.sub('', (ROOT / name).read_text())
    return [target for target in LINK.findall(text) if not re.match(r'[a-z]+:', target)]


def read_commands(block):
    """Return the commands of a shell block, each as (as printed, its words)."""
    lines = block.text.replace('\\\n', ' ').splitlines()
    return [(' '.join(line.split()), words) for line in lines if (words := shlex.split(line, comments=True))]
