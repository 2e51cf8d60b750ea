"""The line that an epoch leaves in the log, and the time that is left."""

import pytest

from timm_multiexit.training.epoch_log import Eta, format_epoch_line


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
