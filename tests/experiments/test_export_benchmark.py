"""benchmark.py export: its table, and how failures come into it."""

import json
import time

import numpy as np
import pytest
import torch

import benchmark
from benchmarks import exporting
from benchmarks.export_time import force_exit
from timm_multiexit.policies.leaving import apply_policy
from timm_multiexit.policies.policy import CRITERIA, ExitPolicy
from timm_multiexit.utils.environment import describe_environment


def test_difference_is_of_the_largest_logit_of_each_classifier():
    expected = [torch.tensor([[1.0, -4.0]]), torch.tensor([[100.0, 50.0]])]
    found = [np.array([[1.0, -4.2]], np.float32), np.array([[101.0, 50.0]], np.float32)]
    assert exporting.compare(found, expected) == pytest.approx(0.05)


def test_failures_and_late_networks_are_rows_with_their_reason(tmp_path, monkeypatch):
    def raise_error():
        raise ValueError('two\nlines')

    networks = {'Odd': raise_error, 'Slow': lambda: time.sleep(60), 'cifar_gone': lambda: exit(3)}
    monkeypatch.setattr(exporting, 'list_networks', lambda is_lively=True: networks)
    path = tmp_path / 'parity.json'
    shown = []
    exporting.check_networks(list(networks), path, seconds=2, show=shown.append)
    rows = json.loads(path.read_text())['rows']
    assert [json.loads(line) for line in shown] == rows
    assert [row.pop('commit') for row in rows] == [describe_environment()['commit']] * 3
    assert rows == [
        {'network': 'Odd', 'result': 'ValueError: two lines'},
        {'network': 'Slow', 'result': 'not done in 2 s'},
        {'network': 'cifar_gone', 'result': 'the process ended with code 3'},
    ]
    page = path.with_suffix('.md').read_text()
    assert '0 of 3 networks agree (0 of 2 families of timm, 0 of 1 CIFAR networks)' in page
    assert '| Slow |  |  |  |  |  |  |  |  |  | not done in 2 s |' in page


def test_random_policies_leave_at_every_exit():
    generator = np.random.default_rng(0)
    logits = [generator.normal(size=(50, 5)).astype(np.float32) * 3 for _ in range(3)]
    for criterion in CRITERIA:
        left = set()
        for _ in range(40):
            policy = exporting.draw_policy(generator, logits, criterion, None)
            left |= set(apply_policy(policy, [torch.from_numpy(single) for single in logits]).exit_idx.tolist())
        # Patience needs a second exit that agrees.
        assert left == ({1, 2} if criterion == 'patience' else {0, 1, 2}), criterion


def test_forced_thresholds_leave_at_their_place_alone():
    feed = force_exit(ExitPolicy('entropy', (0.5, None, 0.5)), 2, np.zeros((1, 3, 2, 2), np.float32))
    assert feed['thresholds'].tolist()[::2] == [-1.0, 2.0]
    assert np.isnan(feed['thresholds'][1])
    assert feed['temperatures'].tolist() == [1, 1, 1, 1]


def test_unknown_networks_are_one_line(run_script):
    code, out, err = run_script(benchmark.main, 'export', 'NoFamily')
    assert (code, out) == (2, '')
    assert err.startswith('benchmark.py: error: NETWORK must be one of Beit, ')
    assert err.endswith('got NoFamily.\n')


@pytest.mark.slow
def test_network_is_compared_and_the_file_is_gone_on_with(run_script, tmp_path):
    for name in ('cifar_resnet8', 'ResNet'):
        code, _, err = run_script(benchmark.main, 'export', name, '--output', 'out/parity.json')
        assert (code, err) == (0, '')
    rows = json.loads((tmp_path / 'out/parity.json').read_text())['rows']
    assert [(row['network'], row['result']) for row in rows] == [('ResNet', 'equal'), ('cifar_resnet8', 'equal')]
    for row in rows:
        assert all(0 < row[column] <= exporting.LIMIT for column in exporting.COLUMNS)


@pytest.mark.slow
def test_times_are_measured_and_policies_compared(run_script, make_model):
    import timm_multiexit as tme

    tme.save_pretrained(make_model().eval(), 'net', data_config={'input_size': (3, 64, 64)})
    code, out, err = run_script(benchmark.main, 'export-time', 'net', '--rounds', 2, '--policies', 24)
    assert (code, err) == (0, '')
    for program in ('whole again', 'chain', 'conditional, to main', 'exit 0, fixed', 'main, cut by hand again'):
        assert f'\n{program} ' in out
    assert out.splitlines()[-1].split()[:2] == ['24', '24']


@pytest.mark.slow
def test_int8_programs_are_timed_and_their_accuracy_is_that_of_the_manifest(run_script, make_model, tmp_path):
    import timm_multiexit as tme
    from timm_multiexit.deploy.quantize import quantize

    model = make_model().eval()
    tme.save_pretrained(model, 'net', data_config={'input_size': (3, 64, 64)})
    tme.export(model, 'exported', forms=('fixed', 'stages'))
    flags = ('export-time', 'net', '--rounds', 2, '--policies', 24, '--int8', 'exported')
    code, _, err = run_script(benchmark.main, *flags)
    assert code == 2
    assert '--int8 must be a folder with int8 programs, got exported: export it with --int8.' in err
    images = [(torch.randn(8, 3, 64, 64), torch.arange(8)) for _ in range(2)]
    quantize(tmp_path / 'exported', images[:1], images[1:], limit=100)
    code, out, err = run_script(benchmark.main, *flags)
    assert (code, err) == (0, '')
    for row in ('chain, fp32 again', 'chain, int8', 'exit 0, int8', 'main, int8'):
        assert f'\n{row} ' in out
    found = json.loads((tmp_path / 'exported/manifest.json').read_text())['int8']['top1']
    line = next(line.split() for line in out.splitlines() if line.startswith('main ') and line.endswith(' 8'))
    assert [float(cell) for cell in line[1:3]] == [found['fp32'][-1], found['int8'][-1]]


@pytest.mark.parametrize('place', [0, 1])
def test_logits_that_are_not_numbers_are_no_match(place):
    expected = [torch.ones(1, 2), torch.ones(1, 2)]
    found = [single.numpy().copy() for single in expected]
    assert exporting.compare(found, expected) == 0
    found[place][0, 0] = np.nan
    assert not exporting.compare(found, expected) <= exporting.LIMIT
    assert not exporting.largest([0.0, np.nan, 0.0]) <= exporting.LIMIT
