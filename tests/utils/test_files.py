"""Files that are whole or not there, and what is said where the disk refuses them."""

import errno
import fcntl
import hashlib
import multiprocessing
import os
import stat
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError

from timm_multiexit.checkpoints.save import save_pretrained
from timm_multiexit.utils.errors import DiskError, HubError, InvalidValueError, MultiExitError, StateError
from timm_multiexit.utils.files import (
    RESUME,
    RUN_AGAIN,
    explain_disk_errors,
    lock_file,
    new_folder,
    replacing,
    sha256,
    write_output,
    write_text,
)


def refuse(*args, **kwargs):
    raise OSError(28, 'No space left\non device')


def refuse_as_torch():
    try:
        refuse()
    finally:
        raise RuntimeError('unexpected pos 64 vs 0')  # its own words, while the disk's are in its context


def write_replacing(path):
    with replacing(path) as draft:
        draft.write_text('new')


def write_folder(path):
    with new_folder(path, ['mark', 'other'], ['mark', 'other', 'part/*.txt']) as draft:
        (draft / 'mark').write_text('new')
        (draft / 'other').write_text('new')


WRITERS = {'text': lambda path: write_text(path, 'new'), 'replacing': write_replacing, 'folder': write_folder}


@pytest.mark.parametrize('write', WRITERS.values(), ids=WRITERS)
def test_full_disk_says_nothing_of_training_where_nothing_is_trained(write, tmp_path, monkeypatch):
    monkeypatch.setattr('pathlib.Path.write_text', refuse)
    with pytest.raises(DiskError) as caught:
        write(tmp_path / 'a')
    assert str(caught.value) == (
        f'{tmp_path / "a"} could not be written: No space left on device; free disk space, then run it again.'
    )
    assert list(tmp_path.iterdir()) == []


def test_caller_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr('pathlib.Path.write_text', refuse)
    with pytest.raises(MultiExitError, match='device; free disk space, call the caretaker[.]$'):
        write_text(tmp_path / 'a', 'new', advice='call the caretaker')
    with pytest.raises(MultiExitError, match=r'then resume by --resume auto[.]$'), explain_disk_errors(tmp_path):
        refuse()
    assert '--resume' in RESUME
    assert '--resume' not in RUN_AGAIN


@pytest.mark.parametrize(
    ('number', 'remedy'),
    [
        (errno.ENOSPC, 'free disk space'),
        (errno.EDQUOT, 'free disk space'),
        (errno.EACCES, 'make it writable or name another folder'),
        (errno.EROFS, 'make it writable or name another folder'),
        (errno.ENOTDIR, 'name another folder, there is a file where one must be'),
        (errno.EEXIST, 'name another folder, there is a file where one must be'),
        (errno.EISDIR, 'name another file, there is a folder where it must be'),
        (errno.ENAMETOOLONG, 'give a shorter name'),
        (errno.EIO, 'see to the disk'),
    ],
)
def test_remedy_fits_what_the_system_says(number, remedy, tmp_path):
    error = OSError(number, os.strerror(number))
    expected = f'{tmp_path} could not be written: {os.strerror(number)}; {remedy}, then run it again.'
    for raised in (error, SafetensorError(f'{os.strerror(number)} (os error {number})')):
        with pytest.raises(DiskError) as caught, explain_disk_errors(tmp_path, advice=RUN_AGAIN):
            raise raised
        assert str(caught.value).replace(f' (os error {number})', '') == expected


def test_file_where_a_folder_must_be_is_told_from_a_full_disk(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(DiskError, match='Not a directory; name another folder, there is a file where one must be'):
        write_text(tmp_path / 'file/a', 'new')
    (tmp_path / 'folder').mkdir()
    with pytest.raises(DiskError, match='Is a directory; name another file, there is a folder'):
        write_text(tmp_path / 'folder', 'new')
    with pytest.raises(DiskError, match='File name too long; give a shorter name'):
        write_text(tmp_path / ('a' * 300), 'new')


@pytest.mark.parametrize('below', ['', 'a/b'])
def test_new_folder_names_the_file_in_its_way(below, tmp_path):
    (tmp_path / 'file').write_text('mine')
    path = tmp_path / 'file' / below
    with pytest.raises(InvalidValueError) as caught:
        write_folder(path)
    assert str(caught.value) == f'{path} must be a folder, got the file {tmp_path / "file"}. Give another folder.'
    assert (tmp_path / 'file').read_text() == 'mine'
    assert [each.name for each in tmp_path.iterdir()] == ['file']


@pytest.mark.parametrize('name', ['index.html', 'part/page.html', 'mark/a', 'deep/mark'])
def test_new_folder_replaces_nothing_but_its_own_kind(name, tmp_path):
    folder = tmp_path / 'out'
    write_folder(folder)
    (folder / 'part').mkdir()
    (folder / 'part/a.txt').write_text('old')
    for leftover in ('__pycache__/a.pyc', 'part/__pycache__/a.pyc', '.mark.tmp'):
        (folder / leftover).parent.mkdir(exist_ok=True)
        (folder / leftover).write_text('old')
    write_folder(folder)
    assert {path.name for path in folder.iterdir()} == {'mark', 'other'}
    if name == 'mark/a':
        (folder / 'mark').unlink()
        (folder / 'other').unlink()
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text('mine')
    with pytest.raises(
        InvalidValueError, match=f'^{folder} holds other files, such as {name}: give another folder[.]$'
    ):
        write_folder(folder)
    assert (folder / name).read_text() == 'mine'
    assert [path.name for path in tmp_path.iterdir()] == ['out']


def test_new_folder_is_known_by_all_of_its_marks(tmp_path):
    (tmp_path / 'mark').write_text('mine')
    with pytest.raises(InvalidValueError, match='holds other files, such as mark: give another folder[.]$'):
        write_folder(tmp_path)
    assert (tmp_path / 'mark').read_text() == 'mine'


@pytest.mark.parametrize(
    ('raised', 'expected'),
    [(PermissionError(errno.EACCES, os.strerror(errno.EACCES)), DiskError), (KeyboardInterrupt(), KeyboardInterrupt)],
    ids=['refused', 'interrupted'],
)
def test_new_folder_that_cannot_be_put_there_leaves_the_old_one(raised, expected, tmp_path, monkeypatch):
    folder = tmp_path / 'out'
    write_folder(folder)
    (folder / 'mark').write_text('old')
    rename = Path.rename

    def stop(path, target):
        if path.name == '.out.new':
            raise raised
        return rename(path, target)

    monkeypatch.setattr(Path, 'rename', stop)
    with pytest.raises(expected):
        write_folder(folder)
    assert (folder / 'mark').read_text() == 'old'
    assert [path.name for path in tmp_path.iterdir()] == ['out']


def test_new_folder_goes_where_a_link_points(tmp_path):
    (tmp_path / 'disk').mkdir()
    (tmp_path / 'out').symlink_to('disk')
    for _ in range(2):
        write_folder(tmp_path / 'out')
        assert (tmp_path / 'disk/mark').read_text() == 'new'
    assert (tmp_path / 'out').is_symlink()


def test_working_directory_is_not_replaced(tmp_path, monkeypatch):
    write_folder(tmp_path / 'out')
    monkeypatch.chdir(tmp_path / 'out')
    with pytest.raises(InvalidValueError, match='out must not be the working directory. Give another folder.$'):
        write_folder('.')


def test_only_errors_of_the_disk_are_explained(tmp_path):
    for error in (HubError('offline'), RuntimeError('out of memory'), ValueError('wrong')):
        with pytest.raises(type(error)) as caught, explain_disk_errors(tmp_path):
            raise error
        assert caught.value is error
    with pytest.raises(DiskError, match='written: No space left on device; free'), explain_disk_errors(tmp_path):
        refuse_as_torch()


def test_sha256_is_that_of_hashlib(tmp_path):
    content = bytes(range(256)) * 5000  # more than one chunk
    (tmp_path / 'a').write_bytes(content)
    assert sha256(tmp_path / 'a') == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize('mask', [0o022, 0o027, 0o077])
def test_saved_files_have_the_mode_of_other_new_files(make_model, tmp_path, mask):
    previous = os.umask(mask)
    try:
        save_pretrained(make_model(), tmp_path / 'net')
    finally:
        os.umask(previous)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / 'net').iterdir()}
    assert modes == dict.fromkeys(('config.json', 'model.safetensors', 'exits.safetensors'), 0o666 & ~mask)


def test_full_disk_leaves_the_old_file_and_is_one_line(tmp_path, monkeypatch):
    path = tmp_path / 'rows.csv'
    path.write_text('old')

    def write_half(self, content):
        self.open('wb').close()
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('pathlib.Path.write_bytes', write_half)
    with pytest.raises(MultiExitError, match='rows.csv could not be written: No space left on device') as raised:
        write_output(path, b'new')
    assert '--resume' not in str(raised.value)
    assert [file.name for file in tmp_path.iterdir()] == ['rows.csv']
    assert path.read_text() == 'old'


def _hold(path, ready):
    file = lock_file(path)
    if not os.fork():  # as processes that load data, which end seconds after the one they work for
        time.sleep(20)
        os._exit(0)
    ready.set()
    time.sleep(60)
    file.close()


def test_locked_file_is_free_when_its_process_is_killed(tmp_path):
    context = multiprocessing.get_context('fork')
    path, ready = tmp_path / 'run' / '.lock', context.Event()
    path.parent.mkdir()
    process = context.Process(target=_hold, args=(path, ready))
    process.start()
    ready.wait()
    with pytest.raises(StateError) as caught:
        lock_file(path)
    line = f'{path.parent} is in use by another process, {process.pid} on {os.uname().nodename}: wait until it ends,'
    assert str(caught.value) == f'{line} or name another folder.'
    process.kill()
    process.join()
    with lock_file(path):
        assert path.read_text() == f'{os.getpid()} on {os.uname().nodename}'


@pytest.mark.parametrize('number', [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_file_system_without_locks_does_without(number, tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, 'lockf', refuse)
    assert lock_file(tmp_path / '.lock') is None
