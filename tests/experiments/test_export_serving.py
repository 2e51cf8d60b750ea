"""benchmark.py export-serving: what it counts, and its errors."""

import numpy as np
import pytest
import torch

import benchmark
from benchmarks import export_serving
from benchmarks.export_serving import EagerRunner, Serving
from timm_multiexit.deploy.runner import Answer
from timm_multiexit.utils.errors import InvalidValueError


class FakeRunner:
    """Images are [N, 1, 1, 1], whose value is the exit where they leave; it calls all of them class 1, main class 0.

    The head of exit 0 costs a twentieth of main, and is run under the budget of 60% alone.
    """

    manifest = {
        'exits': [{}, {}, {}],
        'num_classes': 2,
        'preprocessing': {'input_size': [1, 1, 1]},
    }

    def __init__(self):
        self.sizes = []

    def __call__(self, images):
        self.sizes.append(len(images))
        return np.tile(np.float32([1, 0]), (len(images), 1))

    def macs(self, exit_idx, skipped):
        return (0.1, 0.6, 1.1)[exit_idx] - (0.05 if 0 in skipped and exit_idx else 0)

    def unused(self, budget):
        return [] if budget == '60%' else [0]

    def infer(self, images, budget):
        self.sizes.append(len(images))
        exit_idx = images.reshape(-1).astype(np.int64)
        return Answer(np.where((exit_idx == 2)[:, None], np.float32([1, 0]), np.float32([0, 1])), exit_idx)


def test_accuracy_and_macs_are_those_of_what_was_answered(monkeypatch):
    # Ten images: five leave at exit 0, three at exit 1, two at main. Two turns of four images, and two images more.
    monkeypatch.setattr(export_serving, '_TURN', 4)
    times = iter(range(1000))
    monkeypatch.setattr(export_serving, 'read_clock', lambda device: next(times))
    images = np.float32([0, 0, 0, 1, 2, 0, 1, 2, 0, 1]).reshape(10, 1, 1, 1)
    classes = np.array([0, 1, 1, 1, 0, 0, 0, 1, 0, 0])
    first, second = FakeRunner(), FakeRunner()
    rows = Serving({'net': first, 'other': second}, ['60%', '50%']).measure(images, classes, 2)
    assert [row['call'] for row in rows] == ['main', 'main again', 'net, 60%', 'net, 50%', 'other, 60%', 'other, 50%']
    main, early, skipping = rows[0], rows[2], rows[3]
    assert (main['top-1, %'], main['MACs, %']) == (60.0, 100.0)  # six images are of class 0
    # Right: three of class 1 that leave early, and the first image of class 0 that main answers.
    assert early['top-1, %'] == 40.0
    assert early['MACs, %'] == pytest.approx((5 * 10 + 3 * 60 + 2 * 110) / 10)
    assert skipping['MACs, %'] == pytest.approx((5 * 10 + 3 * 55 + 2 * 105) / 10)
    # A turn of four images takes one tick of this clock.
    assert {(row['batch'], row['images/s'], row['speed']) for row in rows} == {(2, 4.0, 1.0)}
    # Each call once to see that it can, once to warm up, and for five batches of two.
    assert (first.sizes.count(1), first.sizes.count(2)) == (4, 6 * 4)
    assert (second.sizes.count(1), second.sizes.count(2)) == (2, 6 * 2)


def test_folders_of_two_networks_are_refused():
    other = FakeRunner()
    other.manifest = {**other.manifest, 'exits': other.manifest['exits'][1:]}
    runners = {'net': FakeRunner(), 'other': other}
    with pytest.raises(InvalidValueError, match='^FOLDER must be one network in all forms, got another one in other.$'):
        Serving(runners, ['60%'])


def test_pytorch_answers_as_a_runner_does(make_model):
    model = make_model().eval()
    model.calibrate([(torch.randn(32, 3, 64, 64), torch.arange(32) % 10)], budget='80%')
    images = torch.randn(5, 3, 64, 64)
    eager = EagerRunner(model, (3, 64, 64))
    with torch.no_grad():
        assert torch.allclose(torch.from_numpy(eager(images.numpy())), model(images), atol=1e-5)
    answer, expected = eager.infer(images.numpy(), '80%'), model.infer(images, budget='80%')
    assert answer.exit_idx.tolist() == expected.exit_idx.tolist()
    assert torch.allclose(torch.from_numpy(answer.logits), expected.logits, atol=1e-5)
    policy, costs = model.budgets.select('80%').policy, model.cost()
    heads = [sum(costs[idx].head.macs for idx in policy.used if idx <= exit_idx) for exit_idx in range(len(costs))]
    paths = [cost.fixed.macs - (cost.head.macs if idx < len(costs) - 1 else 0) for idx, cost in enumerate(costs)]
    found = eager.find_costs('80%')
    for exit_idx in (*policy.used, len(costs) - 1):
        assert found[exit_idx] == pytest.approx((paths[exit_idx] + heads[exit_idx]) / costs[-1].fixed.macs)
    other = FakeRunner()
    other.manifest = {**other.manifest, 'preprocessing': {'input_size': [3, 64, 64]}}
    message = '^FOLDER must be one network in all forms, got another one in --model.$'
    with pytest.raises(InvalidValueError, match=message):
        Serving({'net': other}, ['60%'], model)


@pytest.mark.slow
def test_exported_folders_answer_real_images(run_script, make_model, image_folder, tmp_path):
    import timm_multiexit as tme

    model = make_model(num_classes=2).eval()
    tme.export(model, tmp_path / 'stages', forms=('fixed', 'stages'), class_names=('cat', 'dog'))
    flags = ('--images', image_folder / 'val', '--batch-sizes', 1, 4)
    code, out, err = run_script(benchmark.main, 'export-serving', 'stages', '--images', 'nowhere')  # not looked for yet
    assert (code, out) == (2, '')
    assert 'The network has no table of budgets' in err
    model.calibrate([(torch.randn(32, 3, 64, 64), torch.arange(32) % 2)], budget='80%')
    tme.export(model, tmp_path / 'conditional', forms=('fixed', 'conditional'), class_names=('cat', 'dog'))
    flags = (*flags, '--budgets', '80%')
    tme.save_pretrained(model, tmp_path / 'model')
    eager = ('--model', 'model', '--output', 'table.txt')
    code, out, err = run_script(benchmark.main, 'export-serving', 'conditional', *flags, *eager)
    assert (code, err) == (0, '')
    assert (tmp_path / 'table.txt').read_text() == out
    rows = [line.split() for line in out.splitlines() if ', 80%' in line]
    assert [row[1] for row in rows] == 2 * ['conditional,', 'PyTorch,']
    assert len({tuple(row[3:5]) for row in rows}) == 1  # the same accuracy and MACs
    assert out.count('PyTorch, main') == 2
    lines = [line for line in out.splitlines() if 'PyTorch' not in line]
    rows = [line.split() for line in lines if 'conditional, 80%' in line or ' main ' in line]
    assert [row[0] for row in rows] == ['1', '1', '1', '4', '4', '4']
    assert len({row[-5] for row in rows if row[1] == 'main'}) == 1  # main answers alike, whatever the batches are
    for wrong, message in (
        (('--images', 'nowhere'), '--images must be a folder with a folder of images per class, got nowhere.'),
        (('--num-images', 12), '--num-images must be <= 11, the images of'),
        (('--num-images', 0), '--num-images must be >= 1, got 0.'),
    ):
        code, out, err = run_script(benchmark.main, 'export-serving', 'conditional', *flags, *wrong)
        assert (code, out) == (2, '')
        assert err.startswith('benchmark.py: error: ')
        assert message in err
        assert err.count('\n') == 1
    (image_folder / 'val/cat').rename(image_folder / 'val/tiger')
    code, _, err = run_script(benchmark.main, 'export-serving', 'conditional', *flags)
    assert code == 2
    assert '--images must have the 2 classes of the network, got 2, from dog on.' in err
