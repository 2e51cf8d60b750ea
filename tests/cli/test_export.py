"""`timm-multiexit export` as its users run it."""

import json

import pytest
import timm
import torch
from helpers import cases, enliven

import timm_multiexit as tme
from timm_multiexit.__main__ import main
from timm_multiexit.deploy.manifest import read_manifest
from timm_multiexit.deploy.runner import Runner
from timm_multiexit.policies.budgets import PolicyResult

POLICIES = [tme.ExitPolicy('confidence', (value, None)) for value in (0.2, 0.9)]


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """A run whose best network has a table of budgets."""
    torch.manual_seed(0)
    backbone = enliven(timm.create_model('test_resnet', num_classes=4))
    model = enliven(tme.attach_exits(backbone, [1, 2], input_size=(3, 64, 64))).eval()
    total = model.cost()[-1].fixed.macs
    points = [
        PolicyResult(policy, 80.0 + idx, (0.5, 0, 0.5), total * (0.6 + 0.2 * idx))
        for idx, policy in enumerate(POLICIES)
    ]
    model.policy, model.budgets = POLICIES[1], tme.BudgetTable(tuple(points), total, total * 1.1)
    folder = tmp_path_factory.mktemp('run') / 'best'
    tme.save_pretrained(
        model, folder, label_names=['ant', 'bee', 'cow', 'dog'], data_config={'input_size': (3, 64, 64)}
    )
    tme.save_pretrained(timm.create_model('test_resnet', num_classes=4), folder.parent / 'plain')
    return model, folder


def test_run_is_exported_and_answers(saved, run_script, tmp_path):
    model, folder = saved
    code, out, err = run_script(main, 'export', folder.parent, '--output', 'net', '--budget', '60%')
    assert (code, err) == (0, '')
    lines = out.splitlines()
    assert lines[0].split('  ')[0] == 'exit'
    assert [line.split()[0] for line in lines[1:4]] == ['0', '1', 'main']
    assert lines[4] == 'Wrote net: python net/runner.py net PICTURE answers.'
    manifest = read_manifest('net')
    assert manifest['classes'] == ['ant', 'bee', 'cow', 'dog']
    assert manifest['policy'] == POLICIES[0].to_dict()
    assert [point['policy'] for point in manifest['budgets']] == [policy.to_dict() for policy in POLICIES]
    images = torch.randn(4, 3, 64, 64)
    for budget in ('60%', '100%'):
        found, expected = Runner('net').infer(images.numpy(), budget=budget), model.infer(images, budget=budget)
        assert found.exit_idx.tolist() == expected.exit_idx.tolist()
        torch.testing.assert_close(torch.from_numpy(found.logits), expected.logits, rtol=1e-4, atol=1e-5)


def test_flags_choose_programs_policy_and_names(saved, run_script, tmp_path):
    (tmp_path / 'names.txt').write_text('red\ngreen\nblue\ngrey\n')
    flags = '--forms conditional --threshold 0.5,none --criterion entropy --combine mean --class-names names.txt'
    code, _, err = run_script(main, 'export', f'local-dir:{saved[1]}', '--output', 'net', *flags.split())
    assert (code, err) == (0, '')
    manifest = json.loads((tmp_path / 'net/manifest.json').read_text())
    assert manifest['programs']['fp32'] == {
        'fixed': [],
        'stages': [],
        'conditional': {'path': 'conditional.onnx', 'criterion': 'entropy', 'combine': 'mean'},
    }
    assert manifest['policy']['thresholds'] == [0.5, None]
    assert manifest['classes'] == ['red', 'green', 'blue', 'grey']


WRONG = {
    'no model': ('nowhere', 'MODEL must be the folder of a run or of a model, or hf-hub:ORG/NAME, got '),
    'a timm name': ('resnet18', 'MODEL must be the folder of a run or of a model, or hf-hub:ORG/NAME, got '),
    'no exits': ('{plain}', 'MODEL must have exits to be exported, got '),
    'two policies': ('{best} --budget 60% --threshold 0.5', '--budget and --threshold are mutually exclusive'),
    'a budget that cannot be met': ('{best} --budget 1%', 'The budget must be 60% to '),
    'a budget without unit': ('{best} --budget 60', 'A budget must be a share of the plain backbone such as'),
    'thresholds of another count': ('{best} --threshold 0.5,0.5,0.5', 'The policy must have one threshold for each of'),
    'an unknown form': ('{best} --forms whole', "--forms must be one of fixed, stages, conditional, got 'whole'."),
    'an unknown format': ('{best} --formats tflite', "--formats must be one of onnx, pt2, got 'tflite'."),
    'no file of names': ('{best} --class-names nothing.txt', 'Cannot read --class-names nothing.txt: No such file'),
    'a size too small': ('{best} --img-size 0', '--img-size must be >= 1, got 0.'),
}


@pytest.mark.parametrize(('flags', 'message'), cases(WRONG))
def test_wrong_flags_are_one_line_and_nothing_is_written(saved, run_script, tmp_path, flags, message):
    words = flags.format(best=saved[1], plain=saved[1].parent / 'plain').split()
    code, out, err = run_script(main, 'export', *words, '--output', 'net')
    assert (code, out) == (2, '')
    assert err.startswith(f'timm-multiexit export: error: {message}')
    assert err.count('\n') == 1
    assert list(tmp_path.iterdir()) == []


def test_output_is_required_and_others_folders_stay(saved, run_script, tmp_path):
    code, _, err = run_script(main, 'export', saved[1])
    assert (code, err) == (2, 'timm-multiexit export: error: the following arguments are required: --output\n')
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine/notes.txt').write_text('mine')
    code, _, err = run_script(main, 'export', saved[1], '--output', 'mine')
    assert code == 2
    assert 'mine holds other files or is in use: give another folder.' in err
    assert [path.name for path in (tmp_path / 'mine').iterdir()] == ['notes.txt']
