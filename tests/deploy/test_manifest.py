"""The manifest: what it says, and folders that were changed."""

import json
import shutil

import pytest
import timm
import torch
from helpers import cases

import timm_multiexit as tme
from timm_multiexit.calibration.stage_costs import StageCosts
from timm_multiexit.deploy.manifest import (
    describe_budgets,
    describe_exported,
    find_class_names,
    read_costs,
    read_manifest,
)
from timm_multiexit.policies.budgets import PolicyResult


@pytest.fixture
def folder(exported, tmp_path):
    """A copy of an exported folder, to change."""
    return shutil.copytree(exported.folder, tmp_path / 'copy')


def test_costs_and_preprocessing_are_those_of_the_model(exported):
    model, folder = exported.model, exported.folder
    manifest = read_manifest(folder)
    costs = model.cost()
    assert manifest['plain_macs'] == costs[-1].fixed.macs
    assert [entry['name'] for entry in manifest['exits']] == ['exit 0', 'exit 1', 'exit 2', 'main']
    assert [entry['macs'] for entry in manifest['exits']] == [
        {'fixed': cost.fixed.macs, 'sequential': cost.sequential.macs} for cost in costs
    ]
    assert [entry['params'] for entry in manifest['exits']] == [cost.fixed.params for cost in costs]
    config = timm.data.resolve_data_config(model=model)
    assert manifest['preprocessing'] == {
        'input_size': [3, 64, 64],
        **{name: config[name] for name in ('interpolation', 'crop_pct', 'crop_mode')},
        'mean': list(config['mean']),
        'std': list(config['std']),
    }
    assert read_costs(manifest) == StageCosts.from_exit_costs(costs)
    assert manifest['versions']['torch'].partition('+')[0] == torch.__version__.partition('+')[0]
    assert (manifest['format'], manifest['opset'], manifest['budgets'], manifest['int8']) == (1, 20, [], None)


def test_mean_and_std_are_one_per_channel():
    backbone = timm.create_model('test_resnet', num_classes=3, in_chans=1)
    model = tme.attach_exits(backbone, [1], input_size=(1, 64, 64))
    preprocessing = describe_exported(model, (1, 64, 64), class_names=None, policy=None)['preprocessing']
    assert preprocessing['input_size'] == [1, 64, 64]
    assert (len(preprocessing['mean']), len(preprocessing['std'])) == (1, 1)


def test_budgets_are_the_points_with_macs():
    policy = tme.ExitPolicy('confidence', (0.5,))
    points = tuple(
        PolicyResult(policy, accuracy, (0.5, 0.5), macs) for accuracy, macs in ((80.0, 100.0), (90.0, 150.0))
    )
    table = tme.BudgetTable(points, 200.0, 220.0)
    costs = StageCosts((90.0, 200.0), (20.0,))
    assert describe_budgets(table, costs) == [
        {'macs': 100.0, 'accuracy': 80.0, 'policy': policy.to_dict()},
        {'macs': 150.0, 'accuracy': 90.0, 'policy': policy.to_dict()},
    ]
    timed = tuple(PolicyResult(policy, 80.0, (0.5, 0.5), None, 1.0) for _ in range(1))
    assert describe_budgets(tme.BudgetTable(timed, total_ms=2.0, max_ms=3.0), costs) == []
    assert describe_budgets(None, costs) == []
    # Of other images half spend 300 + 50 and half 800 + 50.
    other = describe_budgets(table, StageCosts((300.0, 800.0), (50.0,)))
    assert [(point['macs'], point['accuracy']) for point in other] == [(600.0, 80.0), (600.0, 90.0)]


def test_class_names_are_the_loaded_ones_where_they_fit(small):
    assert find_class_names(small) is None
    try:
        small.backbone.pretrained_cfg['label_names'] = [f'n{idx}' for idx in range(10)]
        assert find_class_names(small) == [f'n{idx}' for idx in range(10)]
        small.backbone.pretrained_cfg['label_names'] = ['too', 'few']
        assert find_class_names(small) is None
    finally:
        del small.backbone.pretrained_cfg['label_names']


def edit(change):
    """Return what changes the manifest of a folder."""

    def apply(folder):
        path = folder / 'manifest.json'
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))

    return apply


def append(name):
    def apply(folder):
        with (folder / name).open('ab') as file:
            file.write(b'x')

    return apply


def flip(name):
    def apply(folder):
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(bytes(content))

    return apply


def link(folder):
    target = folder.parent / 'elsewhere.onnx'
    shutil.move(folder / 'conditional.onnx', target)
    (folder / 'conditional.onnx').symlink_to(target)


CHANGES = {
    'no manifest': (
        lambda folder: (folder / 'manifest.json').unlink(),
        'is not an exported folder: it has no manifest',
    ),
    'a missing program': (lambda folder: (folder / 'fixed/main.onnx').unlink(), 'has no fixed/main.onnx'),
    'a longer program': (append('stages/exit_0.onnx'), 'exit_0.onnx must have '),
    'a changed program': (flip('conditional.onnx'), 'conditional.onnx has changed'),
    'a changed pt2': (flip('fixed/exit_1.pt2'), 'exit_1.pt2 has changed'),
    'a changed runner': (append('runner.py'), 'runner.py must be the file that manifest.json lists'),
    'a missing runner': (lambda folder: (folder / 'runner.py').unlink(), 'runner.py must be the file that'),
    'a link that leaves': (link, 'got a link that leaves it'),
    'an unknown key': (edit(lambda values: values.update(more=1)), "unknown key 'more'"),
    'an unknown key inside': (edit(lambda values: values['exits'][0].update(more=1)), "unknown key 'more'"),
    'a missing key': (edit(lambda values: values.pop('opset')), "no key 'opset'"),
    'a later format': (edit(lambda values: values.update(format=2)), 'format must be 1, got 2'),
    'a path outside': (
        edit(lambda values: values['files'].update({'../up': values['files']['runner.py']})),
        'path of plain names',
    ),
    'other MACs of main': (edit(lambda values: values.update(plain_macs=1)), 'plain_macs must be the fixed macs of'),
    'less MACs with all heads': (
        edit(lambda values: values['exits'][1]['macs'].update(sequential=1)),
        'macs must be fixed >= 0 and sequential >= fixed, got ',
    ),
    'no programs': (
        edit(
            lambda values: values.update(programs={'fp32': {'fixed': [], 'stages': [], 'conditional': None}}, pt2=None)
        ),
        'it must have programs, got none',
    ),
    'another count of thresholds': (edit(lambda values: values['policy'].update(thresholds=[0.5])), 'threshold'),
    'not JSON': (lambda folder: (folder / 'manifest.json').write_text('{'), 'cannot be read'),
}


@pytest.mark.parametrize(('change', 'message'), cases(CHANGES))
def test_changed_folders_are_refused_in_one_line(folder, change, message):
    change(folder)
    with pytest.raises(tme.CheckpointError) as raised:
        read_manifest(folder)
    assert message in str(raised.value)
    assert '\n' not in str(raised.value)


def test_copied_folder_is_read(folder, exported):
    assert read_manifest(folder) == read_manifest(exported.folder)
    flip('conditional.onnx')(folder)
    read_manifest(folder, checks_hashes=False)
