"""Which checkpoint a run is resumed from, and what must fit it."""

import json
import multiprocessing
import os
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import yaml
from timm.optim import create_optimizer_v2
from torch import nn

from timm_multiexit.cli import train
from timm_multiexit.training.resume import find_resume, load_optimizer, read_position, read_resume
from timm_multiexit.utils.errors import CheckpointError
from timm_multiexit.utils.files import lock_file


def write_checkpoint(folder, name, **values):
    folder.mkdir(exist_ok=True)
    torch.save(values, folder / name)


def test_resume_takes_the_checkpoint_that_is_furthest(tmp_path):
    assert find_resume(tmp_path) is None
    assert find_resume(tmp_path / 'absent') is None

    def saved(epoch, batch):
        return {'saver': {'run': RUN | {'epoch': epoch, 'batch': batch}}}

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
    optimizer.param_groups[0]['lr'] = 0.1
    load_optimizer(optimizer, {'optimizer': other.state_dict()}, 'x.pth.tar', has_schedule=False)
    assert optimizer.param_groups[0]['lr'] == 0.1


def test_settings_are_those_of_the_flags_that_are_given_now():
    own = make_optimizer('AdamW', weight_decay=0.5, betas=(0.5, 0.6), eps=1e-3)
    other = make_optimizer('AdamW', weight_decay=0.1)
    own.param_groups[0].update(initial_lr=0.7, lr_scale=0.25)
    other.param_groups[0].update(initial_lr=0.1, lr_scale=1.0, lr=0.3)
    load_optimizer(own, {'optimizer': other.state_dict()}, 'x.pth.tar')
    group = own.param_groups[0]
    assert (group['weight_decay'], group['betas'], group['eps']) == (0.5, (0.5, 0.6), 1e-3)
    assert (group['initial_lr'], group['lr_scale'], group['lr']) == (0.7, 0.25, 0.3)
    assert own.state[group['params'][0]]['exp_avg'].tolist() == pytest.approx([0.1] * 3)


def test_bookkeeping_of_an_optimizer_is_kept():
    params = [nn.Parameter(torch.ones(3))]
    own, other = (create_optimizer_v2(params, 'lookahead_sgd', lr=0.1, weight_decay=decay) for decay in (0.5, 0.1))
    params[0].sum().backward()
    for _ in range(4):
        other.step()
    load_optimizer(own, {'optimizer': other.state_dict()}, 'x.pth.tar')
    assert (own.param_groups[0]['lookahead_step'], own.param_groups[0]['weight_decay']) == (4, 0.5)


def test_milestone_and_best_epoch_of_a_run_that_goes_back(train_run, image_folder):
    folder = image_folder.parent / 'out/run'
    flags = ('--val-interval', 3, '--save-epochs', 1)
    train_run('--epochs', 3, *flags)
    milestone = torch.load(folder / 'milestone-1.pth.tar', weights_only=False)
    err = train_run('--epochs', 3, '--stop-epoch', 1, *flags, '--resume', folder / 'milestone-1.pth.tar')
    assert 'All 1 epochs' in err
    for name in ('milestone-1', 'last'):
        again = torch.load(folder / f'{name}.pth.tar', weights_only=False)
        assert read_position(again) == (1, 0)
        assert all(torch.equal(value, again['state_dict'][key]) for key, value in milestone['state_dict'].items())
    err = train_run('--epochs', 4, '--resume', 'auto', '--eval-metric', 'mean_top1')
    assert json.loads((folder / 'results.json').read_text())['best_epoch'] in (1, 2, 3)


def test_run_of_before_a_flag_had_its_default(train_run, image_folder):
    train_run('--epochs', 1, '--eed')
    path = image_folder.parent / 'out/run/last.pth.tar'
    checkpoint = torch.load(path, weights_only=False)
    for name in ('exit_teacher_weights', 'freeze_bn_stats'):
        delattr(checkpoint['args'], name)
    torch.save(checkpoint, path)
    line = train_run('--epochs', 2, '--eed', '--exit-teacher-weights', 'skill', '--resume', 'auto', refused=True)
    assert line.startswith("--exit-teacher-weights must be 'equal', as in out/run/last.pth.tar, got 'skill'.")
    assert 'Other flags than before from epoch 2 on: --epochs 2 (was 1), --freeze-bn-stats True' in train_run(
        '--epochs', 2, '--eed', '--freeze-bn-stats', '--initial-checkpoint', path, '--resume', 'auto'
    )


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


RUN = {'epoch': 1, 'batch': 0, 'num_batches': 3, 'seed': 42, 'grad_accum_steps': 1, 'summary': {'rows': []}}
DAMAGED = {
    'none': (None, 'must hold a dict, got None'),
    'list': ([1, 2], r'must hold a dict, got \[1, 2\]'),
    'tensor': (torch.zeros(1), 'must hold a dict, got tensor'),
    'saver': ({'saver': [1]}, r'is damaged: saver must not be \[1\]'),
    'run': ({'saver': {'run': 5}}, 'is damaged: run must not be 5'),
    'empty-run': ({'saver': {'run': {'batch': 1}}}, 'is damaged: epoch must not be None'),
    'run-epoch': ({'saver': {'run': RUN | {'epoch': '1'}}}, "is damaged: epoch must not be '1'"),
    'run-batch': ({'saver': {'run': RUN | {'batch': -1}}}, 'is damaged: batch must not be -1'),
    'summary': ({'saver': {'run': RUN | {'summary': [1]}}}, r'is damaged: summary must not be \[1\]'),
    'rows': ({'saver': {'run': RUN | {'summary': {'rows': [{'a': 'b'}]}}}}, 'is damaged: summary must not be'),
    'task': ({'task_state': 5}, 'is damaged: task_state must not be 5'),
    'epoch': ({'epoch': 'x'}, "is damaged: epoch must not be 'x'"),
    'version': ({'epoch': 1, 'version': [2]}, r'is damaged: version must not be \[2\]'),
}


@pytest.mark.parametrize(('content', 'message'), DAMAGED.values(), ids=DAMAGED)
def test_checkpoint_of_something_else_is_one_line(content, message, tmp_path):
    torch.save(content, tmp_path / 'x.pth.tar')
    with pytest.raises(CheckpointError, match=message) as caught:
        read_resume(tmp_path / 'x.pth.tar')
    assert '\n' not in str(caught.value)


def test_what_is_no_checkpoint_comes_with_what_to_give(tmp_path):
    def refused(path):
        with pytest.raises(CheckpointError) as caught:
            read_resume(path)
        return str(caught.value)

    best = tmp_path / 'run/best'
    best.mkdir(parents=True)
    (tmp_path / 'weights.safetensors').touch()
    for name in ('args.yaml', 'best/model.safetensors', 'best/config.json'):
        (best.parent / name).write_text('exit_loss: eed')
    assert refused(best).endswith(
        f'got the folder {best}. Start a new run from it by --model local-dir:{best} --pretrained.'
    )
    assert refused(tmp_path / 'weights.safetensors').endswith(
        f'no state of a run. Start a new run from it by --initial-checkpoint {tmp_path}/weights.safetensors.'
    )
    (best.parent / 'last.pth.tar').touch()
    hint = f'Give --resume {best.parent}/last.pth.tar.'
    assert refused(best.parent) == (
        f'--resume must be a checkpoint of training or auto, got the folder {best.parent}. {hint}'
    )
    assert refused(best / 'model.safetensors') == (
        f'{best}/model.safetensors holds weights alone, and no state of a run. {hint}'
    )
    assert refused(best.parent / 'args.yaml').endswith('it was not written by torch.save. Flags are given by --config.')
    assert refused(best.parent / 'last.pth.tar').startswith('Cannot read checkpoint ')


def _hold_folder(folder, ready):
    file = lock_file(folder / '.lock')
    ready.set()
    time.sleep(60)
    file.close()


@pytest.fixture
def train_run(run_script, image_folder):
    """Return a function that trains into out/run and returns the last line of the log; `refused` where it must be."""
    base = ['--model', 'test_resnet', '--img-size', 32, '-b', 8, '-j', 0, '--data-dir', image_folder, '--lr', 0.01]
    base += ['--output', 'out', '--experiment', 'run', '--warmup-epochs', 0, '--exits', '1']

    def run(*flags, refused=False):
        folder = image_folder.parent / 'out/run'
        before = {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}
        code, _, err = run_script(train.main, *base, *flags)
        assert code == (2 if refused else 0), err
        if refused:
            assert {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()} == before
        return err.strip().splitlines()[-1].removeprefix('train.py: error: ') if refused else err

    return run


def test_run_goes_on_with_its_own_loss_and_says_what_else_has_changed(train_run, image_folder):
    train_run('--exit-loss', 'eed', '--epochs', 1)
    own = Path('out/run/last.pth.tar')
    for flags, message in (
        (('--exit-loss', 'ce'), f"--exit-loss must be 'eed', as in {own}, got 'ce'."),
        (('--eed', '--exit-teacher', 'main'), f"--exit-teacher must be None, as in {own}, got 'main'."),
        (('--eed', '--exit-weights', '1,2'), f'--exit-weights must be None, as in {own}, got [1.0, 2.0].'),
        (('--eed', '--exit-output-weight', '0'), f'--exit-output-weight must be None, as in {own}, got 0.0.'),
        (('--eed', '--exit-temperature', '2'), f'--exit-temperature must be None, as in {own}, got 2.0.'),
        (('--eed', '--smoothing', '0'), f'--smoothing must be 0.1, as in {own}, got 0.0.'),
    ):
        line = train_run(*flags, '--epochs', 2, '--resume', 'auto', refused=True)
        assert line.startswith(f'{message} Give the loss that the run was begun with, or continue in a run of its own:')
    changed = ('--eed', '--epochs', 2, '--weight-decay', 0.1, '--log-interval', 7)
    assert 'Other flags than before from epoch 2 on: --epochs 2 (was 1), --weight-decay 0.1 (was 2e-05).' in train_run(
        *changed, '--resume', 'auto'
    )
    args = yaml.safe_load((image_folder.parent / 'out/run/args.yaml').read_text())
    changes = {'epochs': [1, 2], 'weight_decay': [2e-5, 0.1]}
    assert args['resumed'] == [{'epoch': 1, 'checkpoint': str(own), 'changed': changes}]
    # A run of its own may; what was before stays in its record.
    line = train_run(
        '--exit-loss', 'ce', '--epochs', 3, '--resume', own, '--experiment', 'other', '--weight-decay', 0.1
    )
    assert "--exit-loss 'ce' (was 'eed')" in line
    args = yaml.safe_load((image_folder.parent / 'out/other/args.yaml').read_text())
    assert [entry['epoch'] for entry in args['resumed']] == [1, 2]
    assert args['resumed'][1]['changed']['exit_loss'] == ['eed', 'ce']


def test_finished_run_is_said_to_be_and_fewer_epochs_are_refused(train_run, image_folder):
    train_run('--epochs', 2)
    results = image_folder.parent / 'out/run/results.json'
    results.unlink()
    err = train_run('--epochs', 2, '--resume', 'auto')
    assert 'All 2 epochs of out/run are done, nothing is trained' in err
    assert 'epochs 3 to' not in err
    assert results.exists()
    line = train_run('--epochs', 1, '--resume', 'auto', refused=True)
    assert line == '--epochs must be >= 2, as out/run/last.pth.tar has done, got 1 in all.'


def test_fixed_statistics_are_of_trained_weights(train_run):
    line = train_run('--epochs', 1, '--freeze-bn-stats', '--resume', 'auto', refused=True)
    assert line.startswith(
        '--freeze-bn-stats keeps the statistics of trained weights, of which --resume auto found none'
    )
    train_run('--epochs', 1)
    err = train_run('--epochs', 2, '--freeze-bn-stats', '--resume', 'auto')
    assert '--freeze-bn-stats True (was False)' in err


def test_folder_that_another_process_works_in_is_refused(train_run, image_folder):
    train_run('--epochs', 1)
    context = multiprocessing.get_context('fork')
    ready = context.Event()
    process = context.Process(target=_hold_folder, args=(image_folder.parent / 'out/run', ready))
    process.start()
    ready.wait()
    line = train_run('--epochs', 2, '--resume', 'auto', refused=True)
    assert line.startswith(f'out/run is in use by another process, {process.pid} on {os.uname().nodename}: wait')
    process.kill()
    process.join()
    train_run('--epochs', 2, '--resume', 'auto')


ODD = {
    'history': lambda saved: saved['saver'].update(checkpoint_files=5),
    'origin': lambda saved: saved.update(args=Namespace(origin=5)),
    'optimizer': lambda saved: saved.update(optimizer=[1]),
    'weights': lambda saved: saved.update(state_dict=5),
}


def test_damage_inside_of_a_checkpoint_is_one_line(train_run, image_folder):
    train_run('--epochs', 1)
    path = image_folder.parent / 'out/run/last.pth.tar'
    for name, damage in ODD.items():
        saved = torch.load(path, weights_only=False)
        damage(saved)
        torch.save(saved, path.with_name('odd.pth.tar'))
        line = train_run('--epochs', 2, '--resume', path.with_name('odd.pth.tar'), refused=True)
        assert 'odd.pth.tar' in line or 'origin of a run must be' in line, (name, line)
