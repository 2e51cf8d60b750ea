"""A run's files through full disks and kills between any two file operations."""

import argparse
import os
import resource
import shutil
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from timm.models import _registry
from torch import nn

from timm_multiexit.checkpoints.timm_checkpoint import read_training_checkpoint
from timm_multiexit.training.resume import find_resume, read_position
from timm_multiexit.training.saver import RunSaver
from timm_multiexit.utils.errors import MultiExitError

BATCHES = (3, 6, 9)  # where an epoch saves itself
METRICS = {'metric': (50.0, 70.0, 60.0, 80.0), 'no-metric': (None,) * 3}


class Killed(BaseException):
    """Ends a run as a kill does: nothing in it catches this."""


class Net(nn.Module):
    """The least that timm writes a configuration of; its weight is the number of the epoch it was trained in."""

    def __init__(self, size=4):
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), -1.0))
        self.pretrained_cfg = {'architecture': 'saver_net', 'input_size': (3, 8, 8)}
        self.num_classes, self.num_features = 2, 4
        self._model_args = {'size': size}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """Only what timm can create anew is saved."""
    monkeypatch.setitem(_registry._model_entrypoints, 'saver_net', lambda size=4, **kwargs: Net(size))


class Run:
    """A run that trains nothing and saves everything."""

    def __init__(self, folder, metrics=METRICS['metric'], size=4):
        self.folder, self.metrics = folder, metrics
        self.model = Net(size)
        self.epoch = self.batch = 0
        folder.mkdir(exist_ok=True)
        self.saver = RunSaver(
            run_state=self.state,
            chosen_by='top1',
            model=self.model,
            optimizer=torch.optim.SGD(self.model.parameters(), lr=0.1),
            args=argparse.Namespace(model='test_resnet'),
            checkpoint_dir=str(folder),
            recovery_dir=str(folder),
            max_history=2,
        )

    def state(self):
        done = {'num_batches': 9, 'seed': 0, 'grad_accum_steps': 1, 'summary': {'rows': []}}
        return {'epoch': self.epoch, 'batch': self.batch, **done}

    def resume(self):
        """Go on where the folder says."""
        self.saver.clean()
        path = find_resume(self.folder)
        if path:
            checkpoint = read_training_checkpoint(path)
            self.model.load_state_dict(checkpoint['state_dict'])
            self.epoch, self.batch = read_position(checkpoint)
            self.saver.load_state_dict(checkpoint['saver'])
        return self

    def close_epoch(self, epoch):
        self.epoch, self.batch = epoch + 1, 0
        nn.init.constant_(self.model.weight, float(epoch))
        if self.saver.is_best(self.metrics[epoch]):
            self.saver.save_best(self.model)
        self.saver.save_checkpoint(epoch, self.metrics[epoch])

    def fit(self):
        for epoch in range(self.epoch, len(self.metrics)):
            for batch in BATCHES:
                if batch > self.batch:
                    self.batch = batch
                    self.saver.save_recovery(epoch, batch)
            self.close_epoch(epoch)
        return self

    def contents(self):
        """Return every file with the epoch that its weights are of; of a checkpoint its bookkeeping too."""
        found = {}
        for path in self.folder.rglob('*'):
            name = str(path.relative_to(self.folder))
            if path.name.endswith('.pth.tar'):
                state = torch.load(path, weights_only=False)
                # timm lists a file that makes room until the next one is there, and it leaves out what is not.
                del state['saver']['checkpoint_files']
                found[name] = (
                    state['epoch'],
                    state['metric'] if 'metric' in state else None,
                    float(state['state_dict']['weight'][0]),
                    state['saver'],
                )
            elif path.suffix == '.safetensors':
                found[name] = float(safetensors.torch.load_file(path)['weight'][0])
            else:
                found[name] = None
        return found


OPERATIONS = [(os, name) for name in ('replace', 'rename', 'link', 'unlink', 'remove', 'rmdir', 'mkdir', 'fsync')]
OPERATIONS += [(torch, 'save'), (safetensors.torch, 'save_file')]


@contextmanager
def kill_before(number):
    """Let the file operation of this number not happen, nor any after it, nor what a dead process would clean up."""
    calls = SimpleNamespace(count=0)

    def call(original, *args, **kwargs):
        calls.count += 1
        if calls.count >= number:
            if original is torch_save and calls.count == number:
                args[1].write(b'half of a file')
            raise Killed
        return original(*args, **kwargs)

    torch_save = torch.save
    with pytest.MonkeyPatch.context() as patch:
        for module, name in OPERATIONS:
            patch.setattr(module, name, partial(call, getattr(module, name)))
        yield calls


def assert_whole(folder):
    """Check what lies in the folder at any moment: `last`, and the best network, the one before it or the next."""
    if (folder / 'last.pth.tar').exists():
        torch.load(folder / 'last.pth.tar', weights_only=False)
        names = [name for name in ('best', '.best-old', '.best-new') if (folder / name).exists()]
        assert names
        for name in names[:1]:
            assert {path.name for path in (folder / name).iterdir()} == {'config.json', 'model.safetensors'}
            safetensors.torch.load_file(folder / name / 'model.safetensors')


@pytest.mark.parametrize(
    'metrics', [pytest.param(METRICS['metric'], marks=pytest.mark.slow), METRICS['no-metric']], ids=METRICS.keys()
)
def test_kill_before_any_file_operation_changes_nothing_in_the_end(metrics, tmp_path, caplog):
    whole = Run(tmp_path / 'whole', metrics).fit()
    expected = whole.contents()
    number = 0
    while True:
        number += 1
        folder = tmp_path / str(number)
        try:
            with kill_before(number):
                Run(folder, metrics).fit()
        except Killed:
            pass
        else:
            break  # a run without so many operations
        assert_whole(folder)
        resumed = Run(folder, metrics).resume()
        leftovers = [path.name for path in folder.iterdir() if path.name[0] == '.' or 'tmp' in path.name]
        assert leftovers == [], number
        resumed.fit()
        assert resumed.contents() == expected, number
        assert resumed.saver.best_epoch == whole.saver.best_epoch
    assert number > 80
    assert 'chosen anew' not in caplog.text


def test_kept_files_by_hand(tmp_path):
    contents = Run(tmp_path / 'run').fit().contents()
    assert {name: value[:3] if isinstance(value, tuple) else value for name, value in contents.items()} == {
        'last.pth.tar': (3, 80.0, 3.0),
        'model_best.pth.tar': (3, 80.0, 3.0),
        'checkpoint-3.pth.tar': (3, 80.0, 3.0),
        'checkpoint-1.pth.tar': (1, 70.0, 1.0),
        'best': None,
        'best/config.json': None,
        'best/model.safetensors': 3.0,
    }


def test_nan_is_worse_than_any_number(tmp_path):
    run = Run(tmp_path / 'run', (float('nan'), -5.0, float('nan'))).fit()
    assert (run.saver.best_epoch, run.saver.best_metric) == (1, -5.0)
    assert run.contents()['best/model.safetensors'] == 1.0
    assert not run.saver.is_best(float('nan'))


def go_back(folder, name, **changes):
    """Resume from an earlier checkpoint of a folder."""
    run = Run(folder)
    checkpoint = read_training_checkpoint(folder / name)
    run.model.load_state_dict(checkpoint['state_dict'])
    run.epoch, run.batch = read_position(checkpoint)
    vars(run.saver).update(changes)
    run.saver.load_state_dict(checkpoint['saver'])
    return run


def test_run_that_goes_back_leaves_no_checkpoint_of_what_it_left(tmp_path, caplog):
    whole = Run(tmp_path / 'run').fit()
    whole.epoch, whole.batch = 5, 0
    nn.init.constant_(whole.model.weight, 4.0)
    whole.saver.save_last(4)  # an epoch that was not measured
    shutil.copy(tmp_path / 'run/last.pth.tar', tmp_path / 'run/milestone-5.pth.tar')
    whole.epoch = 6
    whole.saver.save_last(5)
    for name, epoch in (('milestone-5', 4), ('checkpoint-1', 1)):
        run = go_back(tmp_path / 'run', f'{name}.pth.tar')
        last = torch.load(tmp_path / 'run/last.pth.tar', weights_only=False)
        assert (last['epoch'], float(last['state_dict']['weight'][0])) == (epoch, float(epoch))
        assert read_position(last) == (epoch + 1, 0)
    # The network of epoch 4 is still there, and epoch 2 was the best.
    assert [record.message for record in caplog.records] == [
        f'The best epoch is chosen anew, by top1: {tmp_path}/run/best is not of epoch 2, which was the best until here.'
    ]
    assert run.saver.best_epoch is None
    run.metrics = (None, None, 5.0)
    run.close_epoch(2)
    assert run.saver.best_epoch == 2
    assert run.contents()['best/model.safetensors'] == 2.0


def test_best_epoch_is_chosen_anew_by_another_metric(tmp_path, caplog):
    Run(tmp_path / 'run').fit()
    run = go_back(tmp_path / 'run', 'checkpoint-3.pth.tar')
    assert (run.saver.best_epoch, caplog.records) == (3, [])
    run = go_back(tmp_path / 'run', 'checkpoint-3.pth.tar', chosen_by='loss on the val split')
    assert (run.saver.best_epoch, run.saver.best_metric) == (None, None)
    assert 'anew, by loss on the val split: until here it was chosen by top1.' in caplog.text
    caplog.clear()
    # A kill just then, and again: what was written says nothing of top1.
    run = go_back(tmp_path / 'run', 'last.pth.tar', chosen_by='loss on the val split')
    assert (run.saver.best_epoch, caplog.records) == (None, [])
    # Of the new kind of metric all are below the old ones, and the history is full.
    run.metrics = (*run.metrics, 5.0, 7.0, 6.0)
    for epoch in (4, 5, 6):
        run.close_epoch(epoch)
    assert (run.saver.best_epoch, run.saver.best_metric) == (5, 7.0)
    contents = run.contents()
    assert contents['best/model.safetensors'] == contents['model_best.pth.tar'][2] == 5.0
    assert {name for name in contents if 'checkpoint' in name} == {'checkpoint-5.pth.tar', 'checkpoint-6.pth.tar'}


def test_best_epoch_is_known_where_all_that_is_kept_was_better(tmp_path):
    Run(tmp_path / 'run').fit()
    shutil.rmtree(tmp_path / 'run/best')
    run = go_back(tmp_path / 'run', 'last.pth.tar')
    assert run.saver.best_epoch is None
    run.metrics = (*run.metrics, 20.0, 30.0, 10.0)
    for epoch in (4, 5, 6):
        run.close_epoch(epoch)
    contents = run.contents()
    assert (run.saver.best_epoch, contents['best/model.safetensors'], contents['model_best.pth.tar'][0]) == (5, 5.0, 5)


def test_smaller_history_keeps_the_best(tmp_path):
    Run(tmp_path / 'run', (50.0, 70.0, 60.0)).fit()
    run = go_back(tmp_path / 'run', 'last.pth.tar', max_history=1)
    kept = [name for name in run.contents() if name.startswith('checkpoint-')]
    assert kept == ['checkpoint-1.pth.tar']
    assert [Path(path).name for path, _ in run.saver.checkpoint_files] == kept


def test_epochs_that_are_trained_again_are_forgotten(tmp_path, caplog):
    Run(tmp_path / 'run').fit()
    run = go_back(tmp_path / 'run', 'last.pth.tar')
    run.saver.go_back(2)
    assert [metric for _, metric in run.saver.checkpoint_files] == [70.0]
    assert 'chosen anew, by top1: epoch 4 is trained again' in caplog.text
    run.metrics = (50.0, 70.0, 20.0, 30.0)
    for epoch in (2, 3):
        run.close_epoch(epoch)
    assert (run.saver.best_epoch, run.contents()['best/model.safetensors']) == (3, 3.0)
    names = [Path(path).name for path, _ in run.saver.checkpoint_files]
    assert names == ['checkpoint-1.pth.tar', 'checkpoint-3.pth.tar']


@contextmanager
def no_room(size):
    """Let no file grow beyond a size, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


WRITES = {
    'checkpoint': lambda run: run.saver.save_checkpoint(1, 60.0),
    'recovery': lambda run: run.saver.save_recovery(1, 3),
    'best': lambda run: run.saver.save_best(run.model),
    'milestone': lambda run: run.saver.save_milestone(1),
}


@pytest.mark.parametrize('size', [0, 5_000, 60_000])
@pytest.mark.parametrize('write', WRITES)
def test_full_disk_is_one_line_and_what_was_there_stays_whole(write, size, tmp_path, monkeypatch):
    run = Run(tmp_path / 'run', size=20_000)
    run.close_epoch(0)
    before, occupied = run.contents(), sum(path.stat().st_size for path in run.folder.rglob('*') if path.is_file())
    monkeypatch.setattr(os, 'link', lambda *_: (_ for _ in ()).throw(OSError('no links here')))
    nn.init.constant_(run.model.weight, 1.0)
    with (
        no_room(size),
        pytest.raises(MultiExitError, match='could not be written: .*resume by --resume auto') as error,
    ):
        WRITES[write](run)
    assert '\n' not in str(error.value)
    assert 'File too large' in str(error.value)
    # Nothing half written takes the room that is missing.
    assert sum(path.stat().st_size for path in run.folder.rglob('*') if path.is_file()) == occupied
    after = Run(tmp_path / 'run', size=20_000).resume()
    assert after.contents() == before
    assert after.epoch == 1


@pytest.mark.parametrize('name', ['rename', 'replace'])
def test_move_that_the_disk_refuses_is_one_line(name, tmp_path, monkeypatch):
    run = Run(tmp_path / 'run')
    run.close_epoch(0)
    before = run.contents()

    def refuse(*args, **kwargs):
        raise PermissionError(13, 'Permission denied')

    with monkeypatch.context() as patch:
        patch.setattr(os, name, refuse)
        with pytest.raises(MultiExitError, match='could not be written: .*Permission denied') as error:
            run.close_epoch(1)
    assert '\n' not in str(error.value)
    resumed = Run(tmp_path / 'run').resume()
    if name == 'replace':
        assert resumed.contents() == before
    else:  # the last move of the epoch, which is kept therefore
        assert resumed.epoch == 2
        assert resumed.contents()['best/model.safetensors'] == 1.0
    assert resumed.fit().contents() == Run(tmp_path / 'other').fit().contents()


def test_links_that_the_disk_has_not_become_copies(tmp_path, monkeypatch):
    expected = Run(tmp_path / 'linked').fit().contents()
    monkeypatch.setattr(os, 'link', lambda *_: (_ for _ in ()).throw(OSError('no links here')))
    assert Run(tmp_path / 'copied').fit().contents() == expected
