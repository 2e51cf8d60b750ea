"""`timm-multiexit export` as its users run it."""

import json
import re
import shlex
import subprocess
import sys

import pytest
import timm
import torch
from helpers import cases, enliven
from PIL import Image

import timm_multiexit as tme
from timm_multiexit.__main__ import main
from timm_multiexit.calibration.stage_costs import StageCosts
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


def answer(line, folder):
    """Run the command that `export` prints, on a picture."""
    Image.new('RGB', (70, 80), 'orange').save(folder / 'PICTURE', 'png')
    words = shlex.split(line.removeprefix('Wrote ').partition(': ')[2].removesuffix(' answers.'))
    assert words[0] == 'python'
    done = subprocess.run([sys.executable, *words[1:]], cwd=folder, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, '')
    assert re.fullmatch(r'PICTURE: [\w ]+, [0-9.]+ %, at (exit \d|main) with \d+ % of the MACs\n', done.stdout)


@pytest.mark.slow
def test_printed_call_works_whatever_was_exported(tmp_path, run_script):
    model = enliven(tme.create_model('test_resnet', exits=[1], num_classes=4)).eval()
    tme.save_pretrained(model, tmp_path / 'model')

    def export(*flags):
        code, out, err = run_script(main, 'export', 'model', '--output', 'my net', '--img-size', '64', *flags)
        assert (code, err) == (0, '')
        return out.splitlines()[-1]

    line = export('--forms', 'conditional')  # without a policy of its own
    assert line == "Wrote my net: python 'my net/runner.py' 'my net' PICTURE --threshold 0.9 answers."
    answer(line, tmp_path)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(images, exit_idx=0)
    call = re.fullmatch('Wrote my net: (.*) with my net/runner.py answers[.]', export('--forms', 'fixed'))[1]
    found = torch.from_numpy(eval(call, {'Runner': Runner, 'images': images.numpy()}))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    line = export('--forms', 'fixed', '--formats', 'pt2')
    found = eval(re.fullmatch('Wrote my net: (.*) answers[.]', line)[1], {'torch': torch, 'images': images})
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_budgets_are_those_of_the_size_that_is_exported(saved, run_script):
    model, folder = saved
    flags = ('--output', 'net', '--img-size', '96', '--forms', 'stages')
    code, _, err = run_script(main, 'export', folder, *flags)
    assert (code, err) == (0, '')
    costs = StageCosts.from_exit_costs(model.cost((3, 96, 96)))
    (first, _, last), (head, _) = costs.paths, costs.heads  # by hand: half leave at exit 0, nobody uses exit 1
    assert costs.total > 2 * model.budgets.total_macs
    expected = (0.5 * first + 0.5 * last) + head
    budgets = read_manifest('net')['budgets']
    assert [point['macs'] for point in budgets] == pytest.approx([expected, expected])
    lowest = 100 * expected / costs.total
    code, _, err = run_script(main, 'export', folder, *flags, '--budget', f'{lowest - 1:.2f}%')
    assert code == 2
    assert 'The budget must be ' in err
    assert run_script(main, 'export', folder, *flags, '--budget', f'{lowest + 0.01:.2f}%')[0] == 0


def test_run_is_exported_and_answers(saved, run_script, tmp_path):
    model, folder = saved
    code, out, err = run_script(main, 'export', folder.parent, '--output', 'net', '--budget', '60%')
    assert (code, err) == (0, '')
    lines = out.splitlines()
    assert lines[0].split('  ')[0] == 'exit'
    assert [line.split()[0] for line in lines[1:4]] == ['0', '1', 'main']
    assert lines[4] == 'Wrote net: python net/runner.py net PICTURE answers.'
    answer(lines[4], tmp_path)
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
    'a budget without unit': ('{best} --budget 60', "A budget must be a share of main's cost such as"),
    'thresholds of another count': ('{best} --threshold 0.5,0.5,0.5', 'The policy must have one threshold for each of'),
    'an unknown form': ('{best} --forms whole', "--forms must be one of fixed, stages, conditional, got 'whole'."),
    'an unknown format': ('{best} --formats tflite', "--formats must be one of onnx, pt2, got 'tflite'."),
    'no file of names': ('{best} --class-names nothing.txt', 'Cannot read --class-names nothing.txt: No such file'),
    'a size too small': ('{best} --img-size 0', '--img-size must be >= 1, got 0.'),
}


WITHOUT_MODEL = {
    'two policies': ('--budget 60% --threshold 0.5', '--budget and --threshold are mutually exclusive'),
    'a budget without unit': ('--budget 60', "A budget must be a share of main's cost such as"),
    'a threshold above 1': ('--threshold 1.5', "A threshold of 'confidence' must be in [0, 1], or None"),
    'half a streak': (
        '--threshold 0.5 --criterion patience',
        "A threshold of 'patience' must be an integer in [1, 1000]",
    ),
    'no threshold': (
        '--threshold high',
        '--threshold must be numbers, or none for an exit that is not used, such as 0.9 or 0.9,none,0.8, got ',
    ),
    'a criterion alone': ('--criterion confidence', '--criterion is for --threshold: give both, or neither.'),
    'a combination alone': ('--budget 60% --combine mean', '--combine is for --threshold: give both, or neither.'),
    'a conditional pt2': ('--forms conditional --formats onnx pt2', 'forms must have fixed or stages for the format'),
    'int8 without stages': ('--int8 --calib-data digits --forms fixed', '--int8 is made of the stages in ONNX: '),
    'int8 without images': ('--int8', '--int8 needs images to calibrate on: give --calib-data DATA.'),
    'no file of names': ('--class-names nothing.txt', 'Cannot read --class-names nothing.txt: No such file'),
}


@pytest.mark.parametrize(('flags', 'message'), cases(WITHOUT_MODEL))
def test_flags_are_checked_before_the_model_is_looked_for(run_script, tmp_path, flags, message):
    code, out, err = run_script(main, 'export', 'nowhere', *flags.split(), '--output', 'net')
    assert (code, out) == (2, '')
    assert err.startswith(f'timm-multiexit export: error: {message}')
    assert err.count('\n') == 1
    assert list(tmp_path.iterdir()) == []


def test_file_where_the_folder_must_be_is_named_before_the_model(run_script, tmp_path):
    (tmp_path / 'net').write_text('mine')
    for path in ('net', 'net/below'):
        code, _, err = run_script(main, 'export', 'nowhere', '--output', path)
        line = f'{tmp_path / path} must be a folder, got the file {tmp_path / "net"}. Give another folder.'
        assert (code, err) == (2, f'timm-multiexit export: error: {line}\n')
    assert (tmp_path / 'net').read_text() == 'mine'


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
    assert 'mine holds other files, such as notes.txt: give another folder.' in err
    assert [path.name for path in (tmp_path / 'mine').iterdir()] == ['notes.txt']
