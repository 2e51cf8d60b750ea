"""What mkdocs does to the pages of docs/ beyond its plugins.

Pages are written for readers on GitHub too: equations are `$...$` or a paragraph of `$$...$$`, and links to other
files of the repository are relative. On the site, equations are MathML, which browsers draw without a script. A linked
file outside docs/ is part of the site below `repository/`: Markdown as a page, pictures as they are, any other text as
a page that shows it.
"""

import html
import logging
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

_logger = logging.getLogger('mkdocs.hooks')

LINK = re.compile(r'(!?\[(?:[^\[\]]|\[[^\]]*\])*\]\()([^)\s#]+)(#[^)\s]*)?(\))')
CODE = re.compile(r'^( *)(```+|~~~+).*?^\1\2 *$|`[^`\n]+`', re.DOTALL | re.MULTILINE)
EQUATION = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
PICTURES = ('.png', '.webp', '.svg', '.jpg')
FOLDER = 'repository'


def repository_path(target, folder):
    """Return the path from the repository's root of a link of a file in `folder`, None for links that are not paths."""
    if re.match(r'[a-z]+:|/', target):
        return None
    return posixpath.normpath(posixpath.join(folder, target))


def site_path(path):
    """Return where a file of the repository is in the site."""
    if path.startswith('docs/'):
        return path.removeprefix('docs/')
    shown = path if path.endswith(('.md', *PICTURES)) else f'{path}.md'
    return f'{FOLDER}/{shown}'


def replace_links(text, replace):
    """Return Markdown in which `replace(target)` stands for each target outside code."""
    code = [match.span() for match in CODE.finditer(text)]

    def change(match):
        if any(start <= match.start() and match.end() <= end for start, end in code):
            return match[0]
        return f'{match[1]}{replace(match[2])}{match[3] or ""}{match[4]}'

    return LINK.sub(change, text)


def find_links(text, folder):
    """Return the files of the repository that Markdown of a file in `folder` links to."""
    found = []
    replace_links(text, lambda target: found.append(repository_path(target, folder)) or target)
    return {path for path in found if path}


def make_file(config, root, path):
    """Return the site's file for a file of the repository outside docs/."""
    source = root / path
    if path.endswith(PICTURES):
        return File.generated(config, site_path(path), abs_src_path=str(source))
    text = source.read_text()
    if not path.endswith('.md'):
        text = f'# {path}\n\n````{source.suffix.removeprefix(".") or "text"}\n{text}\n````\n'
    return File.generated(config, site_path(path), content=text)


def on_files(files, *, config):
    """Add the files of the repository that pages link to, and those that these link to."""
    root = Path(config.config_file_path).parent
    waiting = [(file.content_string, f'docs/{posixpath.dirname(file.src_uri)}') for file in files.documentation_pages()]
    seen = set()
    while waiting:
        text, folder = waiting.pop()
        for path in find_links(text, folder) - seen:
            seen.add(path)
            if path.startswith(('docs/', '../')) or not (root / path).is_file():
                continue  # mkdocs says which links lead nowhere
            files.append(make_file(config, root, path))
            if path.endswith('.md'):
                waiting.append(((root / path).read_text(), posixpath.dirname(path)))
    return files


def on_page_markdown(markdown, *, page, config, files):
    """Point links at where the site has their files."""
    uri = page.file.src_uri
    is_copy = uri.startswith(f'{FOLDER}/')
    source = uri.removeprefix(f'{FOLDER}/') if is_copy else f'docs/{uri}'

    def replace(target):
        path = repository_path(target, posixpath.dirname(source))
        if path is None or path.startswith('../'):
            return target
        return posixpath.relpath(site_path(path), posixpath.dirname(uri) or '.')

    return replace_links(markdown, replace)


def on_page_content(content, *, page, config, files):
    """Turn equations into MathML."""

    def draw(match):
        latex = html.unescape(match[3]).strip()
        drawn = convert(latex, display='block' if match[2] == '[' else 'inline')
        if '\\' in re.sub(r'<annotation.*?</annotation>', '', drawn):
            _logger.warning(f"Cannot draw an equation of '{page.file.src_uri}': {latex}")
        return drawn

    return EQUATION.sub(draw, content)
