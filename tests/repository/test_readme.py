"""Every code block of the README runs: the shell ones here in-process, and as printed in a fresh clone if slow."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import write_images

from timm_multiexit.__main__ import main as commands_main
from timm_multiexit.cli import publish, train, validate
from timm_multiexit.deploy import runner

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r'```(\w+)\n(.*?)```', (ROOT / 'README.md').read_text(), re.DOTALL)


def test_every_block_is_known():
    assert [language for language, _ in BLOCKS] == [
        *(
            'shell',
            'shell',
            'python',
            'python',
            'python',
            'shell',
            'python',
            'python',
            'shell',
            'python',
            'shell',
            'python',
        )
    ]


def test_files_that_are_linked_exist():
    links = re.findall(r'\]\((?!http)([^)#]+)\)', (ROOT / 'README.md').read_text())
    assert len(links) == 14
    assert [link for link in links if not (ROOT / link).is_file()] == []


def test_shell_and_python_blocks_run_in_order(run_script, tmp_path, hub):
    """The two commands of a fresh clone are left to the slow test."""
    write_images(tmp_path / 'my/images', num_train=90)
    (tmp_path / 'hub').mkdir()
    (tmp_path / 'hub/checkpoints').symlink_to(ROOT / 'hub/checkpoints')
    scripts = {'train.py': train.main, 'validate.py': validate.main, 'hub/publish.py': publish.main}
    scripts |= {'timm-multiexit': commands_main, 'exported/runner.py': runner.main}
    names = {}
    for language, block in BLOCKS[2:]:
        if language == 'python':
            exec(compile(block, 'README.md', 'exec'), names)
            continue
        commands = [shlex.split(line) for line in block.splitlines()]
        for command in commands:
            script = next(word for word in command if word in scripts)
            workers = ('-j', '0') if script in ('train.py', 'validate.py') else ()
            code, _, err = run_script(scripts[script], *workers, *command[command.index(script) + 1 :])
            scripts.pop(script)
            assert code == 0, err
    assert not scripts
    assert names['early'].shape == (8, 100)
    published = tmp_path / 'output/train/mine/publication'
    assert {path.name for path in published.iterdir()} == {
        *('model.safetensors', 'exits.safetensors', 'config.json', 'args.yaml', 'metrics.json', 'README.md', 'assets')
    }
    assert hub.repositories['org/calibrated'].is_private
    assert names['prediction'].logits.shape == (1, 2)
    assert names['tme'].create_model('local-dir:calibrated', pretrained=True).policy is not None
    # plain timm's network is the main one
    images = names['transform'](names['Image'].open('my/images/val/cat/0.jpg'))[None]
    folder = names['tme'].create_model('local-dir:output/train/mine/best', pretrained=True).eval()
    assert names['torch'].equal(names['plain'].eval()(images), folder(images))


@pytest.mark.slow
def test_first_command_trains_from_a_fresh_clone(tmp_path):
    if shutil.which('git') is None or shutil.which('pip') is None:
        pytest.skip('a clone needs git, and the README command pip')
    subprocess.run(['git', 'clone', '-q', ROOT, tmp_path / 'clone'], check=True)
    env = {
        key: value for key, value in os.environ.items() if key not in ('VIRTUAL_ENV', 'PYTHONPATH', 'OMP_NUM_THREADS')
    }
    command = BLOCKS[0][1].strip()
    assert command.endswith('accelerate launch train.py --eed')
    done = subprocess.run(['bash', '-c', command], cwd=tmp_path / 'clone', env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {
        line.split()[0]: line.split()
        for line in done.stdout.splitlines()
        if line[:4].strip() in ('0', '1', '2', 'main', 'ens')
    }
    assert list(rows) == ['0', '1', '2', 'main', 'ens']
    assert float(rows['main'][5]) >= 97.0
    assert not subprocess.run(
        ['git', 'status', '--porcelain'], cwd=tmp_path / 'clone', capture_output=True, text=True
    ).stdout.strip()
