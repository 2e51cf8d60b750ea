"""Which checkpoint a run is resumed from, and what must fit it."""

import pytest
import torch
from torch import nn

from timm_multiexit.cli import train
from timm_multiexit.training.resume import find_resume, load_optimizer, read_position
from timm_multiexit.utils.errors import CheckpointError


def write_checkpoint(folder, name, **values):
    folder.mkdir(exist_ok=True)
    torch.save(values, folder / name)


def test_resume_takes_the_checkpoint_that_is_furthest(tmp_path):
    assert find_resume(tmp_path) is None
    assert find_resume(tmp_path / 'absent') is None

    def saved(epoch, batch):
        return {'saver': {'run': {'epoch': epoch, 'batch': batch}}}

    for name, position in (('recovery-1-9', (1, 9)), ('recovery-1-10', (1, 10)), ('recovery-0-99', (0, 99))):
        write_checkpoint(tmp_path, f'{name}.pth.tar', **saved(*position))
    (tmp_path / 'recovery_tmp.pth.tar').write_bytes(b'half')
    assert find_resume(tmp_path).name == 'recovery-1-10.pth.tar'
    write_checkpoint(tmp_path, 'last.pth.tar', **saved(1, 0))
    assert find_resume(tmp_path).name == 'recovery-1-10.pth.tar'
    write_checkpoint(tmp_path, 'last.pth.tar', **saved(2, 0))
    assert find_resume(tmp_path).name == 'last.pth.tar'
    for epoch in (9, 10):
        write_checkpoint(tmp_path, f'recovery-{epoch}-4.pth.tar', **saved(epoch, 4))
    assert find_resume(tmp_path).name == 'recovery-10-4.pth.tar'


@pytest.mark.parametrize(
    ('checkpoint', 'position'),
    [
        ({'epoch': 4, 'version': 2}, (5, 0)),
        ({'epoch': 4, 'version': 1}, (4, 0)),
        ({'epoch': 4}, (4, 0)),
        ({'state_dict': {}}, (0, 0)),
        ({'epoch': 4, 'version': 2, 'saver': {'best_epoch': 3}}, (5, 0)),
        ({'epoch': 4, 'version': 2, 'saver': {'run': {'epoch': 4, 'batch': 7}}}, (4, 7)),
    ],
    ids=['timm', 'timm-1', 'timm-0', 'weights', 'timm-saver', 'ours'],
)
def test_position_of_a_checkpoint(checkpoint, position):
    assert read_position(checkpoint) == position


def test_damaged_checkpoint_is_named(tmp_path):
    (tmp_path / 'last.pth.tar').write_bytes(b'no checkpoint')
    with pytest.raises(CheckpointError, match='Cannot read checkpoint .*last.pth.tar') as error:
        find_resume(tmp_path)
    assert '\n' not in str(error.value)


def make_optimizer(kind, count=2, **kwargs):
    params = [nn.Parameter(torch.ones(3)) for _ in range(count)]
    optimizer = getattr(torch.optim, kind)(params, lr=0.1, **kwargs)
    sum(param.sum() for param in params).backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ('own', 'saved'),
    [
        (('SGD', 2), ('AdamW', 2)),
        (('AdamW', 2), ('SGD', 2)),
        (('RMSprop', 2), ('Adam', 2)),
        (('AdamW', 2), ('AdamW', 3)),
        (('AdamW', 3), ('AdamW', 2)),
    ],
    ids=['adamw-sgd', 'sgd-adamw', 'adam-rmsprop', 'more', 'fewer'],
)
def test_state_of_another_optimizer_is_refused_in_one_line(own, saved):
    optimizer = make_optimizer(*own)
    state = {'optimizer': make_optimizer(*saved).state_dict()}
    with pytest.raises(CheckpointError, match=r"The optimizer in x.pth.tar does not fit this run's: .*--no-resume-opt"):
        load_optimizer(optimizer, state, 'x.pth.tar')
    with pytest.raises(CheckpointError, match='has no optimizer state') as error:
        load_optimizer(optimizer, {}, 'x.pth.tar')
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('kind', ['SGD', 'AdamW'])
def test_state_of_the_same_optimizer_is_taken(kind):
    optimizer, other = make_optimizer(kind), make_optimizer(kind)
    other.param_groups[0]['lr'] = 0.3
    other.step()
    load_optimizer(optimizer, {'optimizer': other.state_dict()}, 'x.pth.tar')
    assert optimizer.param_groups[0]['lr'] == 0.3
    assert str(optimizer.state_dict()) == str(other.state_dict())


MISFITS = {
    'architecture': (('--model', 'test_resnet'), ('--model', 'test_vit')),
    'fewer-exits': (('--exits', '2'), ('--exits', '1')),
    'exits-of-a-plain-run': ((), ('--exits', '1')),
    'plain-of-a-run-with-exits': (('--exits', '1'), ()),
    'optimizer': (('--opt', 'adamw'), ('--opt', 'sgd')),
}


@pytest.mark.parametrize(('flags', 'others'), MISFITS.values(), ids=MISFITS.keys())
def test_run_of_something_else_is_one_line_and_its_folder_stays_as_it_is(flags, others, run_script, image_folder):
    base = ['--model', 'test_resnet', '--img-size', 32, '-b', 8, '-j', 0, '--data-dir', image_folder]
    base += ['--output', 'out', '--experiment', 'run', '--lr', 0.01, '--warmup-epochs', 0]
    assert run_script(train.main, *base, *flags, '--epochs', 1)[0] == 0
    folder = image_folder.parent / 'out/run'
    before = {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}
    code, _, err = run_script(train.main, *base, *others, '--epochs', 2, '--resume', 'auto')
    assert code == 2, err
    line = err.strip().splitlines()[-1]
    assert line.startswith('train.py: error: ')
    assert 'last.pth.tar' in line
    assert {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()} == before
