"""The line that an epoch leaves in the log, and the time that is left."""

import logging
from types import SimpleNamespace

import pytest

from timm_multiexit.training import epoch_log
from timm_multiexit.training.epoch_log import EpochLog, format_epoch_line


def test_eta_is_the_mean_of_the_last_epochs_times_those_left(caplog, monkeypatch):
    monkeypatch.setattr(epoch_log, '_ETA_WINDOW', 3)
    clock = iter((0.0, 0.0, 100.0, 100.0, 110.0, 110.0, 130.0, 130.0, 160.0, 160.0, 160.0))
    monkeypatch.setattr(epoch_log.time, 'perf_counter', lambda: next(clock))
    log = EpochLog(SimpleNamespace(trackers=[]), num_exits=1, num_epochs=5, log_interval=50)
    caplog.set_level(logging.INFO)
    for epoch in range(5):  # they take 100, 10, 20, 30 and 0 seconds
        log.begin_epoch()
        log.note_epoch(epoch, {'loss': 1.0}, {}, 0.1)
        log.end_epoch(SimpleNamespace(num_updates=epoch), 10.0)
    expected = ['0:06:40', '0:02:45', '0:01:27', '0:00:20', '0:00:00']
    assert [message.rpartition('ETA ')[2] for message in caplog.messages] == expected


def test_epochs_that_are_not_evaluated_have_a_line_and_no_row(caplog, tmp_path):
    log = EpochLog(SimpleNamespace(trackers=[]), num_exits=1, num_epochs=5, log_interval=50)
    caplog.set_level(logging.INFO)
    log.folder = tmp_path
    for epoch in range(5):  # --val-interval 2: those of timm's own script
        is_evaluated = epoch in (1, 3, 4)
        log.note_epoch(
            epoch, {'loss': epoch + 1.0}, {'top1': 50.0} if is_evaluated else {}, 0.1, is_evaluated=is_evaluated
        )
        log.end_epoch(SimpleNamespace(num_updates=epoch), 10.0)
    log.write()
    assert [message[:21] for message in caplog.messages] == [f'Epoch {n}/5  loss {n}.000' for n in range(1, 6)]
    assert (tmp_path / 'summary.csv').read_text().split() == [
        'epoch,train_loss,eval_top1,lr', '1,2.0,50.0,0.1', '3,4.0,50.0,0.1', '4,5.0,50.0,0.1'
    ]  # fmt: skip


ACCURACY = {'exit0': 61.2, 'exit1': 70.1, 'main': 74.0, 'ens': 75.1}


@pytest.mark.parametrize(
    ('changes', 'expected'),
    [
        (
            {},
            'Epoch   3/200  loss 1.234  exit0 61.2 exit1 70.1 main 74.0 ens 75.1  lr 1.0e-01  1234 img/s  12 s  ETA 0:40:03',
        ),
        ({'accuracy': {}}, 'Epoch   3/200  loss 1.234  lr 1.0e-01  1234 img/s  12 s  ETA 0:40:03'),
        (
            {'accuracy': {'main': 5.0}, 'durations': [0.44]},
            'Epoch   3/200  loss 1.234  main 5.0  lr 1.0e-01  1234 img/s  0.4 s  ETA 0:01:27',
        ),
        (
            {'accuracy': {}, 'durations': [940.0, 12.2]},
            'Epoch   3/200  loss 1.234  lr 1.0e-01  1234 img/s  12 s  ETA 1 day, 2:03:12',
        ),
    ],
    ids=['all', 'not evaluated', 'short', 'long'],
)  # fmt: skip
def test_epoch_line(changes, expected):
    row = {'epoch': 2, 'train_loss': 1.2344, 'lr': 0.1}
    values = dict(accuracy=ACCURACY, rate=1234.4, durations=[12.2])
    assert format_epoch_line(row, 200, **values | changes) == expected
