"""The messages that docs/troubleshooting.md explains are those of the package."""

import ast
import re

from helpers.pages import ROOT


def read_texts():
    """All strings of the package; what an f-string fills in is left out."""
    for path in (ROOT / 'timm_multiexit').rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield '\0'.join(part.value for part in node.values if isinstance(part, ast.Constant))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_messages_are_those_of_the_package():
    lines = (ROOT / 'docs/troubleshooting.md').read_text().splitlines()
    messages = [
        code for line in lines for code in re.findall(r'`([^`]+ [^`]+)`', line.split(' | ')[0]) if line[:1] == '|'
    ]
    assert len(messages) >= 30
    texts = '\n'.join(read_texts())
    parts = {part.strip() for message in messages for part in message.split('...')}
    assert [part for part in parts if part not in texts] == []
