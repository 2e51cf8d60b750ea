"""summary.csv and curves.png."""

import csv
import io
import math
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from timm_multiexit.training import summary
from timm_multiexit.training.summary import Summary, draw_curves
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


def test_curves_say_what_was_measured_and_which_epoch_is_kept(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(summary, 'encode_png', lambda figure: drawn.append(figure) or b'')
    options = {'images': 'the validation split', 'best_epoch': 1, 'chosen_by': 'top1'}
    draw_curves(tmp_path / 'curves.png', make_summary(3).rows, NAMES, **options)
    draw_curves(tmp_path / 'curves.png', make_summary(3).rows, NAMES)
    accuracy, _ = drawn[0].axes
    assert accuracy.get_title() == 'measured on the validation split'
    (line,) = [line for line in accuracy.get_lines() if line.get_label() == 'epoch 2, best top1']
    assert list(line.get_xdata()) == [2, 2]
    assert 'epoch 2, best top1' in [text.get_text() for text in accuracy.get_legend().get_texts()]
    assert not [line for line in drawn[1].axes[0].get_lines() if 'best' in line.get_label()]


def test_classifiers_that_are_alike_all_show(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(summary, 'encode_png', lambda figure: drawn.append(figure) or b'')
    columns = {'eval_exit0_top1': 30.0, 'eval_exit1_top1': 30.0, 'eval_top1': 30.0}
    rows = [{'epoch': epoch, 'train_loss': 1.0, **columns} for epoch in range(2)]
    draw_curves(tmp_path / 'curves.png', rows, ('exit0', 'exit1', 'main'))
    lines = sorted(drawn[0].axes[0].get_lines(), key=lambda line: line.get_zorder())
    assert [line.get_label() for line in lines] == ['main', 'exit1', 'exit0']  # from below
    widths = [line.get_linewidth() for line in lines]
    assert all(below - above >= 0.5 for below, above in zip(widths, widths[1:]))


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
