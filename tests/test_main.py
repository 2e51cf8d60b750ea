"""One program with commands, beside the scripts of the repository."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import timm_multiexit as tme
from timm_multiexit.__main__ import COMMANDS, main
from timm_multiexit.version import __version__

FOLDER = Path(importlib.import_module('timm_multiexit.cli').__file__).parent


@pytest.mark.parametrize('flag', ['-h', '--help'])
def test_help_lists_the_commands(flag, capsys):
    assert main([flag]) == 0
    out = capsys.readouterr().out
    assert out.startswith('usage: timm-multiexit ')
    assert all(f'  {name} ' in out for name in COMMANDS)


def test_version_is_the_packages(capsys):
    assert main(['--version']) == 0
    assert capsys.readouterr().out == f'timm-multiexit {__version__}\n'


def test_no_command_shows_the_usage_with_code_2(capsys):
    assert main([]) == 2
    assert capsys.readouterr().err.startswith('usage: timm-multiexit')


@pytest.mark.parametrize(
    ('argv', 'end'),
    [
        (['trian', '--eed'], "got 'trian'. Did you mean train?"),
        (['flags'], "got 'flags'. See timm-multiexit --help."),  # a module of the folder, but no command
        (['--eed'], "got '--eed'. See timm-multiexit --help."),
    ],
    ids=['typo', 'module', 'flag'],
)
def test_unknown_command_is_one_line_with_code_2(argv, end, capsys):
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ''
    assert captured.err == f'timm-multiexit: error: COMMAND must be one of {", ".join(COMMANDS)}, {end}\n'


@pytest.mark.parametrize('name', COMMANDS)
def test_every_command_has_a_module_and_its_flags_come_through(name, run_script):
    assert (FOLDER / f'{name}.py').is_file()
    code, out, err = run_script(main, name, '--help')
    assert (code, err) == (0, '')
    assert out.startswith(f'usage: timm-multiexit {name} [-h]')


@pytest.mark.parametrize(
    ('argv', 'line'),
    [
        ('train --lr -1', 'timm-multiexit train: error: --lr must be >= 0, got -1.'),
        ('train --eed --exit-loss ce', 'timm-multiexit train: error: --eed and --exit-loss ce contradict each other.'),
        ('validate --time-rounds x', "timm-multiexit validate: error: --time-rounds must be an integer >= 0, got 'x'."),
        ('validate', 'timm-multiexit validate: error: '),
        ('publish nowhere --yes', 'timm-multiexit publish: error: '),
        ('analyze nowhere --samples 1', 'timm-multiexit analyze: error: --samples must be >= 2, got 1.'),
        ('analyze nowhere', 'timm-multiexit analyze: error: '),
    ],
)
def test_errors_name_the_command(argv, line, run_script):
    code, out, err = run_script(main, *argv.split())
    assert code == 2
    assert out == ''
    assert err.splitlines()[-1].startswith(line)
    assert 'Traceback' not in err


@pytest.mark.parametrize(
    'argv',
    [
        'train --output {}',
        'train --config {}',
        'train --resume {}',
        'train --data-dir {}',
        'train --initial-checkpoint {}',
        'validate --model local-dir:{}',
        'validate --model test_resnet --checkpoint {}',
        'validate --model test_resnet --data-dir {}',
        'validate --model test_resnet --results-file {}',
        'export {} --output new',
        'export local-dir:{} --output new',
        'export net --output {}',
        'export net --output new --int8 --calib-data {}',
        'publish {}',
        'analyze {}',
    ],
)
def test_name_that_is_too_long_is_one_line(argv, run_script, make_model, tmp_path):
    tme.save_pretrained(make_model(), tmp_path / 'net')
    code, _, err = run_script(main, *argv.format('x' * 300).split())
    assert code == 2
    assert 'x' * 300 in err.splitlines()[-1]
    assert 'Traceback' not in err
    assert {path.name for path in tmp_path.iterdir()} <= {'net', 'output'}


@pytest.mark.parametrize('name', ['train', 'validate'])
def test_errors_of_a_script_name_the_script(name, run_script):
    code, _, err = run_script(importlib.import_module(f'timm_multiexit.cli.{name}').main, '--batch-size', '0')
    assert (code, err) == (2, f'{name}.py: error: --batch-size must be >= 1, got 0.\n')


def run_process(*words, **kwargs):
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=240, **kwargs)


@pytest.mark.slow
def test_package_runs_as_a_module_and_loads_no_command_for_its_version():
    code = 'import runpy, sys\nsys.argv[1:] = ["--version"]\n'
    code += (
        'try:\n    runpy.run_module("timm_multiexit", run_name="__main__")\nexcept SystemExit as end:\n    print(end)\n'
    )
    code += 'print(*sys.modules)'
    *lines, loaded = run_process('-c', code).stdout.splitlines()
    assert lines == [f'timm-multiexit {__version__}', '0']
    assert 'timm_multiexit.version' in loaded.split()
    assert {f'timm_multiexit.cli.{name}' for name in COMMANDS}.isdisjoint(loaded.split())


@pytest.mark.slow
@pytest.mark.parametrize('launch', [['-m', 'timm_multiexit.cli.train'], [str(FOLDER.parents[1] / 'train.py')]])
def test_accelerate_launches_the_module_as_the_script(launch, image_folder, tmp_path):
    flags = f'--data-dir {image_folder} --model test_resnet --eed --img-size 32 -b 8 -j 0 --epochs 1 --experiment run'
    result = run_process(
        '-m', 'accelerate.commands.launch', '--cpu', *launch, *flags.split(), cwd=tmp_path, env={**os.environ}
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / 'output/train/run/best/config.json').is_file()


@pytest.mark.slow
def test_error_of_a_launched_script_is_shown(tmp_path):
    launch = ['-m', 'accelerate.commands.launch', '--cpu', '-m', 'timm_multiexit.cli.train']
    assert 'train.py: error: --lr must be >= 0, got -1.' in run_process(*launch, '--lr', '-1', cwd=tmp_path).stderr
