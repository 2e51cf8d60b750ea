"""A publication to push, what the Hub on this machine has of it, and the line of a failure."""

import hashlib
import re

import pytest

from timm_multiexit.utils.errors import MultiExitError

REPO = 'org/net'

CARD = b'---\nlicense: apache-2.0\n---\n# Net\n'

SECRET = 'hf_theSecretOfAllTests'

WEIGHTS = 'model.safetensors'

PLOT = 'assets/accuracy_vs_macs.png'


def noise(size, seed=b''):
    """Bytes that no compression makes smaller."""
    return b''.join(hashlib.sha256(seed + b'%d' % idx).digest() for idx in range(size // 32 + 1))[:size]


def write(folder, contents):
    for path, content in contents.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def tree(hub, revision='main', repo_id=REPO):
    """What the server has at a revision, as path -> bytes, without the file that it made itself."""
    files = hub.repositories[repo_id].find(revision).files
    return {path: hub.content(file) for path, file in files.items() if path != '.gitattributes'}


def visible(folder):
    paths = (path for path in folder.rglob('*') if path.is_file())
    return {name: path.read_bytes() for path in paths if '/.' not in '/' + (name := str(path.relative_to(folder)))}


def sent(hub, pattern=''):
    """The requests that change something, among them those whose path has the pattern."""
    writes = [entry for entry in hub.log if entry.method not in ('GET', 'HEAD') and 'validate-yaml' not in entry.path]
    return [entry for entry in writes if re.search(pattern, entry.path)]


def refused(function, *args, **kwargs):
    """The line of the error that a call ends with; nothing on the way to it has the token."""
    with pytest.raises(MultiExitError) as caught:
        function(*args, **kwargs)
    error, line = caught.value, str(caught.value)
    while error is not None:
        assert SECRET not in f'{error} {error!r}'
        error = error.__cause__ or error.__context__
    assert '\n' not in line
    assert line.endswith('.')
    return line
