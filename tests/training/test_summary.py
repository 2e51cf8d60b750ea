"""What a run writes for people: the summary, the figure, trackers, the line of an epoch, the bar."""

import csv
import importlib.util
import io
import logging
import math
import os
import sys
import time
import warnings
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from timm_multiexit.training import summary as records
from timm_multiexit.training.epoch_log import Eta, format_epoch_line
from timm_multiexit.training.summary import Summary, draw_curves
from timm_multiexit.training.trackers import check_trackers, flatten_config, log_epoch, log_step, start_trackers
from timm_multiexit.training.trainer import show_progress
from timm_multiexit.utils.errors import MultiExitError

NAMES = ('exit0', 'exit1', 'main', 'ens')
TRAIN = {'loss': 2.5, 'exit0_loss': 3.0, 'main_top1': 40.0}
EVAL = {'loss': 2.0, 'top1': 60.0, 'top5': 90.0, 'ece': 5.0, 'exit0_top1': 50.0, 'exit1_top1': 55.0, 'ens_top1': 61.0}


def read_csv(path):
    with open(path, newline='') as file:
        return list(csv.reader(file))


def make_summary(num_epochs=3):
    summary = Summary()
    for epoch in range(num_epochs):
        summary.add(epoch, TRAIN, {key: value + epoch for key, value in EVAL.items()}, lr=0.1)
    return summary


def test_summary_has_timm_columns_first_then_those_of_the_exits(tmp_path):
    summary = Summary()
    summary.add(0, TRAIN, EVAL, lr=0.125)
    summary.write(tmp_path / 'summary.csv')
    assert read_csv(tmp_path / 'summary.csv') == [
        'epoch,train_loss,eval_loss,eval_top1,eval_top5,lr,train_exit0_loss,train_main_top1,eval_ece,eval_exit0_top1,'
        'eval_exit1_top1,eval_ens_top1'.split(','),
        '0,2.5,2.0,60.0,90.0,0.125,3.0,40.0,5.0,50.0,55.0,61.0'.split(','),
    ]


def test_summary_of_several_labels_has_map_in_place_of_top1():
    summary = Summary()
    summary.add(0, {'loss': 1.0}, {'loss': 1.0, 'map': 50.0, 'micro_f1': 40.0, 'exit0_map': 30.0}, lr=0.1)
    assert ','.join(summary.columns) == 'epoch,train_loss,eval_loss,eval_map,eval_micro_f1,lr,eval_exit0_map'


def test_epochs_without_evaluation_leave_their_cells_empty(tmp_path):
    summary = Summary()
    summary.add(0, {'loss': 3.0}, {}, lr=0.1)
    summary.add(1, {'loss': 2.0, 'exit0_loss': 2.5}, {'loss': 1.0, 'exit0_loss': 1.5}, lr=0.1)
    summary.add(2, {'loss': 1.0, 'main_loss': 0.5}, {}, lr=0.1)
    summary.write(tmp_path / 'summary.csv')
    assert [','.join(row) for row in read_csv(tmp_path / 'summary.csv')] == [
        'epoch,train_loss,eval_loss,lr,train_exit0_loss,train_main_loss,eval_exit0_loss',
        '0,3.0,,0.1,,,',
        '1,2.0,1.0,0.1,2.5,,1.5',
        '2,1.0,,0.1,,0.5,',
    ]


def test_an_epoch_done_again_replaces_its_row_and_drops_later_ones():
    summary = make_summary(4)
    summary.add(1, {'loss': 7.0}, {}, lr=0.5)
    assert [(row['epoch'], row['train_loss']) for row in summary.rows] == [(0, 2.5), (1, 7.0)]


def test_rows_are_copies():
    summary = make_summary(1)
    summary.rows[0]['lr'] = 9.0
    summary.state_dict()['rows'][0]['lr'] = 9.0
    assert summary.rows[0]['lr'] == 0.1


def test_summary_survives_a_checkpoint_read_with_weights_only():
    summary = Summary()
    summary.add(0, {'loss': torch.tensor(2.5)}, {'top1': np.float64(60)}, lr=np.float32(0.5))
    assert {type(value) for value in summary.rows[0].values()} == {int, float}
    file = io.BytesIO()
    torch.save(summary.state_dict(), file)
    file.seek(0)
    loaded = make_summary()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert loaded.rows == [{'epoch': 0, 'train_loss': 2.5, 'eval_top1': 60.0, 'lr': 0.5}]


def test_a_write_that_fails_half_way_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / 'summary.csv'
    make_summary(1).write(path)
    before = path.read_text()

    class FullDisk(csv.DictWriter):
        def writerows(self, rows):
            super().writerow(rows[0])
            raise OSError('No space left on device')

    monkeypatch.setattr(csv, 'DictWriter', FullDisk)
    with pytest.raises(MultiExitError, match='summary.csv could not be written: No space'):
        make_summary(2).write(path)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_appears_whole_at_once(tmp_path, monkeypatch):
    path, seen = tmp_path / 'summary.csv', []
    replace = os.replace

    def spy(source, target):
        seen.append((Path(source).parent, Path(source).name[0], len(read_csv(source)), path.exists()))
        replace(source, target)

    monkeypatch.setattr(os, 'replace', spy)
    make_summary(3).write(path)
    assert seen == [(tmp_path, '.', 4, False)]
    assert len(read_csv(path)) == 4


def common_colours(path, tmp_path):
    with Image.open(path) as image:
        assert image.format == 'PNG'
        pixels = np.asarray(image.convert('RGB')).astype(np.int64)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    colours, counts = np.unique(pixels @ (1 << 16, 1 << 8, 1), return_counts=True)
    return {tuple(int(colour).to_bytes(3, 'big')) for colour in colours[counts > 100]}


def saturated(colours):
    return {colour for colour in colours if max(colour) - min(colour) > 40}


def test_curves_show_one_colour_per_classifier_and_black_for_the_rest(tmp_path):
    path = tmp_path / 'curves.png'
    assert draw_curves(path, make_summary(3).rows, NAMES, title='test_resnet') is True
    colours = common_colours(path, tmp_path)
    assert len(saturated(colours)) == 3
    assert {(255, 255, 255), (0, 0, 0)} <= colours


def test_curves_of_several_labels_show_map(tmp_path):
    path = tmp_path / 'curves.png'
    rows = [{'epoch': e, 'train_loss': 1.0, 'eval_map': 5.0 * e, 'eval_exit0_map': 4.0 * e} for e in range(3)]
    draw_curves(path, rows, ('exit0', 'main'))
    assert len(saturated(common_colours(path, tmp_path))) == 2


def test_epochs_that_were_not_evaluated_do_not_break_a_line(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    lines, plot = {}, Axes.plot

    def spy(self, x, y, **style):
        lines[style['label']] = (x, y, style.get('linewidth'))
        return plot(self, x, y, **style)

    monkeypatch.setattr(Axes, 'plot', spy)
    rows = [{'epoch': e, 'train_loss': 4.0 - e} | ({'eval_top1': 10.0 * e} if e % 2 else {}) for e in range(4)]
    rows[2]['train_loss'] = math.nan
    draw_curves(tmp_path / 'curves.png', rows, ('main',))
    assert lines == {
        'main': ((2, 4), (10.0, 30.0), 3),
        'training, all classifiers': ((1, 2, 4), (4.0, 3.0, 1.0), None),
    }


NAN_ROW = {'epoch': 0, 'train_loss': math.nan, 'eval_loss': math.inf, 'eval_top1': math.nan, 'eval_exit0_top1': 3.0}


@pytest.mark.parametrize(
    'rows',
    [[], make_summary(1).rows, [NAN_ROW, NAN_ROW | {'epoch': 1}], [{'epoch': 0, 'train_loss': 1e300}]],
    ids=['none', 'one', 'nan', 'huge loss, no evaluation'],
)
def test_curves_of_odd_rows_are_drawn_without_a_warning(tmp_path, rows):
    path = tmp_path / 'curves.png'
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert draw_curves(path, rows, NAMES)
    assert len(common_colours(path, tmp_path)) > 1


def test_without_matplotlib_nothing_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib.backends.backend_agg', None)
    assert draw_curves(tmp_path / 'curves.png', make_summary().rows, NAMES) is False
    assert list(tmp_path.iterdir()) == []


def test_drawing_leaves_pyplot_alone(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, 'matplotlib.pyplot', raising=False)
    draw_curves(tmp_path / 'curves.png', make_summary().rows, NAMES)
    assert 'matplotlib.pyplot' not in sys.modules


def test_a_tracker_must_be_known_and_installed(monkeypatch):
    check_trackers(None)
    check_trackers([])
    with pytest.raises(MultiExitError, match=r"^--log-with is 'mlflow', allowed are tensorboard, wandb\.$"):
        check_trackers(['mlflow'])
    monkeypatch.setitem(records.TRACKERS, 'wandb', lambda: False)
    with pytest.raises(
        MultiExitError,
        match=r'^--log-with wandb needs wandb\. Install it with pip install "timm-multiexit\[wandb\]"\.$',
    ):
        check_trackers(['wandb'])


def test_config_becomes_scalars_and_text():
    config = {'a': True, 'b': 1, 'c': 0.5, 'd': 'x', 'e': None, 'f': [1, 2], 'g': {'h': 1}, 'i': Path('j')}
    assert flatten_config(config) == {
        **{'a': True, 'b': 1, 'c': 0.5, 'd': 'x'},
        **{'e': 'None', 'f': '[1, 2]', 'g': "{'h': 1}", 'i': 'j'},
    }


def needs(package):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f'{package} is not installed')


def make_args(*names, **kwargs):
    defaults = dict(log_with=list(names), wandb_project='digits', wandb_tags=['eed'], wandb_resume_id='', lr=0.1)
    return Namespace(**defaults | dict(ratio=[0.75, 1.5], seed=None, opt_kwargs={}) | kwargs)


def test_without_trackers_logging_does_nothing(tmp_path):
    accelerator = Accelerator(cpu=True)
    start_trackers(accelerator, make_args(log_with=None), tmp_path, 'run')
    log_step(accelerator, {'loss': 1.0}, 0)
    log_epoch(accelerator, {'epoch': 0}, 0)
    accelerator.end_training()
    assert list(tmp_path.iterdir()) == []


def test_another_process_than_the_main_one_starts_no_tracker(tmp_path):
    accelerator = Namespace(is_main_process=False, trackers=[])
    start_trackers(accelerator, make_args('tensorboard'), tmp_path, 'run')
    assert list(tmp_path.iterdir()) == []


def read_scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()['scalars']}


@needs('tensorboard')
def test_tensorboard_holds_steps_and_epochs_by_number_of_updates(tmp_path):
    accelerator = Accelerator(cpu=True)
    start_trackers(accelerator, make_args('tensorboard'), tmp_path, 'run')
    log_step(accelerator, {'loss': torch.tensor(2.0), 'exit0_top1': 25.0}, 4)
    log_step(accelerator, {'loss': 1.0, 'exit0_top1': 50.0}, 8)
    summary = Summary()
    summary.add(0, {'loss': 1.5}, {'top1': 75.0, 'exit0_top1': 62.5}, lr=0.5)
    log_epoch(accelerator, summary.rows[0], 10)
    accelerator.end_training()
    assert read_scalars(tmp_path / 'tensorboard') == {
        'train_step/loss': [(4, 2.0), (8, 1.0)],
        'train_step/exit0_top1': [(4, 25.0), (8, 50.0)],
        'train/epoch': [(10, 0.0)],
        'train/loss': [(10, 1.5)],
        'train/lr': [(10, 0.5)],
        'eval/top1': [(10, 75.0)],
        'eval/exit0_top1': [(10, 62.5)],
    }


@needs('tensorboard')
def test_a_run_that_goes_on_hides_what_was_logged_after_its_checkpoint(tmp_path):
    for start, values in ((0, {5: 1.0, 10: 2.0, 15: 3.0}), (10, {12: 4.0, 17: 5.0})):
        if start:
            time.sleep(1.1)  # event files are read in the order of their names, which hold seconds
        accelerator = Accelerator(cpu=True)
        start_trackers(accelerator, make_args('tensorboard'), tmp_path, 'run', step=start)
        for step, value in values.items():
            log_step(accelerator, {'loss': value}, step)
        accelerator.end_training()
    assert read_scalars(tmp_path / 'tensorboard')['train_step/loss'] == [(5, 1.0), (10, 2.0), (12, 4.0), (17, 5.0)]


@pytest.fixture
def offline_wandb(monkeypatch, tmp_path):
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))


@needs('wandb')
def test_wandb_offline_writes_a_run_with_the_id_asked_for(tmp_path, offline_wandb):
    accelerator = Accelerator(cpu=True)
    args = make_args('wandb', wandb_resume_id='abc123')
    start_trackers(accelerator, args, tmp_path, 'my-run')
    run = accelerator.get_tracker('wandb', unwrap=True)
    assert (run.project, run.name, run.tags, run.id) == ('digits', 'my-run', ('eed',), 'abc123')
    assert (run.config['lr'], run.config['ratio']) == (0.1, '[0.75, 1.5]')
    log_step(accelerator, {'loss': 2.0}, 4)
    log_epoch(accelerator, {'epoch': 0, 'eval_top1': 75.0}, 4)
    accelerator.end_training()
    importlib.import_module('wandb').teardown()  # its service closes the file a moment after the run has finished
    (file,) = tmp_path.glob('wandb/offline-run-*/run-abc123.wandb')
    content = file.read_bytes()
    assert b'train_step/loss' in content
    assert b'eval/top1' in content


@needs('wandb')
def test_wandb_that_does_not_start_is_one_line_and_leaves_nothing_to_finish(tmp_path, offline_wandb):
    accelerator = Accelerator(cpu=True)
    with pytest.raises(MultiExitError, match=r'^--log-with wandb did not start: .*WANDB_MODE=offline\.$') as error:
        start_trackers(accelerator, make_args('wandb', wandb_resume_id='a/b'), tmp_path, 'run')
    assert '\n' not in str(error.value)
    accelerator.end_training()


def test_eta_is_the_mean_of_the_last_epochs_times_those_left():
    eta = Eta(window=3)
    assert eta.estimate(10) is None
    estimates = []
    for seconds in (100.0, 10.0, 20.0, 30.0):
        eta.add(seconds)
        estimates.append(eta.estimate(2))
    assert estimates == [200.0, 110.0, pytest.approx(2 * 130 / 3), 40.0]
    assert eta.estimate(0) == 0.0


ACCURACY = {'exit0': 61.2, 'exit1': 70.1, 'main': 74.0, 'ens': 75.1}


@pytest.mark.parametrize(
    ('changes', 'expected'),
    [
        (
            {},
            'Epoch   3/200  loss 1.234  exit0 61.2 exit1 70.1 main 74.0 ens 75.1  lr 1.0e-01  1234 img/s  12 s  ETA 0:41:10',
        ),
        ({'accuracy': {}}, 'Epoch   3/200  loss 1.234  lr 1.0e-01  1234 img/s  12 s  ETA 0:41:10'),
        (
            {'accuracy': {'main': 5.0}, 'seconds': 0.44, 'eta': None},
            'Epoch   3/200  loss 1.234  main 5.0  lr 1.0e-01  1234 img/s  0.4 s',
        ),
        ({'accuracy': {}, 'eta': 93784.0}, 'Epoch   3/200  loss 1.234  lr 1.0e-01  1234 img/s  12 s  ETA 1 day, 2:03:04'),
    ],
    ids=['all', 'not evaluated', 'short', 'long'],
)  # fmt: skip
def test_epoch_line(changes, expected):
    values = dict(train_loss=1.2344, accuracy=ACCURACY, lr=0.1, rate=1234.4, seconds=12.2, eta=2470.0)
    assert format_epoch_line(2, 200, **values | changes) == expected


def test_the_bar_is_drawn_only_if_asked_for(capsys):
    batches = [1, 2, 3]
    assert show_progress(batches, is_shown=False) is batches
    assert list(show_progress(batches, is_shown=True, description='Epoch 1')) == batches
    captured = capsys.readouterr()
    assert captured.out == ''
    assert 'Epoch 1' in captured.err
    assert '0/3' in captured.err


def test_log_lines_go_above_the_bar_and_the_handlers_come_back(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, 'stderr', stream)
    handler = logging.StreamHandler(stream)
    monkeypatch.setattr(logging.root, 'handlers', [handler])
    for batch in show_progress(iter([1, 2]), is_shown=True, total=2):
        logging.getLogger('timm_multiexit').warning(f'line {batch}')
        assert logging.root.handlers != [handler]
    assert logging.root.handlers == [handler]
    before, between, after = stream.getvalue().replace('line 2\n', 'line 1\n').split('line 1\n')
    assert before.endswith('\r')  # the bar is wiped out before a line, and drawn again after it
    assert '/2 [' in between
    assert '/2 [' in after
