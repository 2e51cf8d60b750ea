"""YAML from anywhere: read in bounded time, or refused in one line."""

import re
import time

import pytest

from timm_multiexit.utils.errors import CheckpointError, MissingFileError
from timm_multiexit.utils.untrusted import read_yaml

BOMB = 'a0: &a0 [x, x]\n' + ''.join(f'a{n}: &a{n} [{", ".join(9 * [f"*a{n - 1}"])}]\n' for n in range(1, 40))
MERGES = 'a0: &a0 {x: 1}\n' + ''.join(f'a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n' for n in range(1, 40))

REFUSED = {
    'bomb': (BOMB, 'it has more than 50000 values, aliases written out'),
    'merges': (MERGES, 'it has more than 50000 values, aliases written out'),
    'cycle': ('a: &a [1, *a]', 'an alias in line 1 is part of what it stands for'),
    'deep': (f'a: {"[" * 5000}', 'it is nested too deeply'),
    'long': ('#' * 300_000, 'must have at most 262144 bytes, got 300000'),
    'twice': ('a: 1\nb: 2\na: 1', "the key 'a' occurs twice, in line 3 again"),
    'twice-inside': ('kwargs: {a: 1, "a": 2}', "the key 'a' occurs twice, in line 1 again"),
    'date': ('a: 2020-99-99', 'month must be in 1..12'),
    'code': ('a: !!python/object/apply:os.system [ls]', 'could not determine a constructor'),
    'key': ('{[1]: 2}', 'unhashable key'),
    'control': ('a: \x01', 'special characters are not allowed'),
    'binary': ('a: \udcff', 'must be a YAML file'),
    'list': ('[1, 2]', 'must be a mapping of flag names to values, got [1, 2].'),
    'number': ('5', 'must be a mapping of flag names to values, got 5.'),
}


@pytest.fixture(scope='module')
def honest_seconds(tmp_path_factory):
    """CPU time of reading 64 KB of flags, a quarter of what is allowed."""
    path = tmp_path_factory.mktemp('honest') / 'args.yaml'
    path.write_text(''.join(f'flag{n:04}: {n}\n' for n in range(2**16 // 15)))
    started = time.process_time()
    assert len(read_yaml(path)) == 4369
    return time.process_time() - started


@pytest.mark.parametrize(('content', 'message'), REFUSED.values(), ids=REFUSED)
def test_yaml_that_is_refused_is_one_line_in_bounded_time(content, message, tmp_path, honest_seconds):
    path = tmp_path / 'args.yaml'
    path.write_bytes(content.encode(errors='surrogateescape'))
    started = time.process_time()
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        read_yaml(path)
    assert time.process_time() - started < 10 * honest_seconds  # 2.5 times the largest file that is read
    assert '\n' not in str(caught.value)
    assert str(path) in str(caught.value)


def test_file_that_is_missing_is_a_missing_file(tmp_path):
    with pytest.raises(MissingFileError, match=r'nowhere.yaml cannot be read: No such file or directory\.$'):
        read_yaml(tmp_path / 'nowhere.yaml')
    with pytest.raises(CheckpointError, match='Is a directory'):
        read_yaml(tmp_path)


def test_aliases_and_merges_of_people_are_read(tmp_path):
    path = tmp_path / 'recipe.yaml'
    path.write_text('base: &base {lr: 0.1, opt: sgd}\nmine: {<<: *base, lr: 0.2}\nsizes: &sizes [1, 2]\nmore: *sizes\n')
    assert read_yaml(path) == {
        'base': {'lr': 0.1, 'opt': 'sgd'},
        'mine': {'lr': 0.2, 'opt': 'sgd'},
        'sizes': [1, 2],
        'more': [1, 2],
    }
    path.write_text('')
    assert read_yaml(path) == {}
