"""Every code block of README.md and docs/ runs, but for those that are listed with a reason.

A page runs in a folder that has the files of a clone and photos of cats and dogs (`photos/train/cat/0.jpg`, ...), its
blocks one after the other: Python in one namespace, the commands of shell blocks in this process. A page with code needs
a row in `PAGES`. What it prints and writes is compared in `CHECKS`.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import timm
import torch
from helpers import write_images
from helpers.pages import ROOT, RUN, SHOWN, list_pages, read_blocks, read_commands, read_links
from PIL import Image
from safetensors.torch import load_file, save
from torchvision.transforms import RandomResizedCrop

from hub.space import make
from timm_multiexit.__main__ import main as commands_main
from timm_multiexit.cli import publish, train, validate
from timm_multiexit.deploy import runner

SCRIPTS = {
    'train.py': train.main,
    'validate.py': validate.main,
    'timm-multiexit': commands_main,
    'hub/publish.py': publish.main,
    'hub/space/make.py': make.main,
    'runner.py': runner.main,
}
FILE_COMMANDS = ('ls', 'mkdir', 'cp', 'cat', 'head')  # run as they are
INSTALLS = 'sets up what the tests already have'
NETWORK = 'needs another host'
LIBRARY = 'needs a library that this project does not install anywhere'
NPM = 'needs packages of npm: tests/space runs it'
COMPILES = 'keeps a C++ compiler busy for minutes: tests/models/test_dynamic.py runs compiled blocks'
STAYS = 'runs until it is stopped'


QUICK = '--epochs 2 --img-size 64 --batch-size 32'
SHORT = '--model test_resnet --epochs 2 --warmup-epochs 0'
TESTED = 'needs several processes: tests/cli/test_distributed.py, test_fsdp.py, test_hosts.py have its like'


def write_imagenette(run_script, hub):
    """Parts of the three photos that the repository has, in folders of the shipped network's ten classes."""
    labels = json.loads((ROOT / 'hub/checkpoints/imagenette_lite0_eed/config.json').read_text())['label_names']
    photos = {path.stem: Image.open(path) for path in (ROOT / 'hub/space/examples').rglob('*.jpg')}
    for idx, label in enumerate(labels):
        photo = photos.get(label, list(photos.values())[idx % len(photos)])
        for split, count in (('held_out', 8), ('val', 3)):
            folder = Path('imagenette', split, label)
            folder.mkdir(parents=True)
            for number in range(count):
                RandomResizedCrop(160, (0.5, 1.0))(photo).save(folder / f'{number}.jpg')


def serve_backbone(run_script, hub):
    """`tf_efficientnet_lite0` as ImageNet trained it, but for its classifier: the shipped network kept its backbone."""
    weights = load_file(ROOT / 'hub/checkpoints/imagenette_lite0_eed/model.safetensors')
    weights |= {'classifier.weight': 0.1 * torch.randn(1000, 1280), 'classifier.bias': torch.zeros(1000)}
    hub.add('timm/tf_efficientnet_lite0.in1k', {'model.safetensors': save(weights, metadata={'format': 'pt'})})


def train_small(run_script, hub):
    """The run `mine`, of a network that is small enough for tests."""
    flags = '--eed --data-dir photos --model test_resnet --img-size 64 --epochs 1 --experiment mine -j 0'
    assert run_script(train.main, *flags.split())[0] == 0


@dataclass(frozen=True)
class Page:
    """How many blocks of code a page has, and what the tests need to know to run them."""

    blocks: int
    not_run: dict[str, str] = field(default_factory=dict)  # a command, or a line of other code -> why
    flags: dict[str, str] = field(default_factory=dict)  # script, or timm-multiexit COMMAND -> flags that shorten it
    prepare: tuple[
        Callable, ...
    ] = ()  # called with `run_script` and `hub` before, for what the page says that a reader has
    path: str | None = None  # a folder that Python imports from, made by the page
    libraries: tuple[str, ...] = ()  # beyond the default environment: the page runs under the marker compat
    is_slow: bool = False
    shows_output: bool = False  # its blocks of text are what it prints


PAGES = {
    'README.md': Page(
        5,
        not_run={
            'pip install uv && uv sync': INSTALLS,
            'pip install ".[plots,onnx]"': INSTALLS,
            'pip install uv && uv run accelerate launch train.py --eed': INSTALLS,  # the slow test runs it in a clone
            'pip install uv && uv run pytest': INSTALLS,
        },
    ),
    'docs/finetune.md': Page(3, prepare=(serve_backbone,), flags={'timm-multiexit train': QUICK}, is_slow=True),
    'docs/index.md': Page(1),
    'docs/infer.md': Page(
        8,
        prepare=(write_imagenette,),
        not_run={'    block.compile()': COMPILES},
        flags={'validate.py': '--batch-size 20'},
        is_slow=True,
    ),
    'docs/models.md': Page(1),
    'docs/publish.md': Page(3, flags={'train.py': SHORT}),
    'docs/quickstart.md': Page(
        5,
        prepare=(serve_backbone,),
        not_run={'pip install uv && uv sync': INSTALLS},
        flags={'timm-multiexit train': QUICK, 'timm-multiexit validate': '-b 20 --time-rounds 1'},
        is_slow=True,
    ),
    'docs/train.md': Page(5, flags={'train.py': SHORT}),
    'docs/deploy.md': Page(
        16,
        prepare=(write_imagenette, train_small),
        path='net',
        flags={'timm-multiexit export': '--int8-limit 10'},  # 40 parts of three photos
        not_run={
            'pip install onnxruntime pillow': INSTALLS,
            'hf download org/mine --include "onnx/*" --local-dir mine': NETWORK,
            'python mine/onnx/runner.py mine/onnx photos/val/cat/0.jpg': NETWORK,
            'python hub/space/make.py net page --examples hub/space/examples': NPM,
            'python -m http.server --directory page': STAYS,
            'import openvino as ov': LIBRARY,
            'from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner': LIBRARY,
            'import litserve as ls': LIBRARY,
        },
        is_slow=True,
    ),
    'docs/distributed.md': Page(
        5,
        not_run={
            'torchrun --nproc-per-node 8 train.py --eed --data-dir DIR --model resnet50': TESTED,
            'accelerate launch --multi_gpu --num_processes 8 train.py --eed --data-dir DIR --model resnet50': TESTED,
            'accelerate launch --use_fsdp --fsdp_version 2 --num_processes 8 --fsdp_auto_wrap_policy '
            'TRANSFORMER_BASED_WRAP --fsdp_transformer_layer_cls_to_wrap Block,ExitHead train.py --eed --data-dir DIR '
            '--model vit_large_patch16_224': TESTED,
            'from torch.distributed.fsdp import fully_shard': TESTED,
            'torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-id RUN --rdzv-endpoint FIRST_HOST:29400 '
            'train.py --eed --data-dir DIR --model resnet50 --experiment NAME --resume auto --recovery-interval 500': TESTED,
            '#SBATCH --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --requeue --signal=TERM@120': 'needs Slurm',
        },
    ),
    'docs/own_network.md': Page(7),
    'docs/own_loop.md': Page(7, libraries=('lightning', 'transformers', 'peft')),
    'docs/paper.md': Page(1, shows_output=True),
    'docs/losses/index.md': Page(1),
    'docs/losses/ce.md': Page(1),
    'docs/losses/phuong.md': Page(1),
    'docs/losses/byot.md': Page(2, shows_output=True),
    'docs/losses/eed.md': Page(1),
    'docs/losses/beed.md': Page(1),
}


def list_cases():
    cases = []
    for name, page in PAGES.items():
        marks = [pytest.mark.compat] * bool(page.libraries) + [pytest.mark.slow] * page.is_slow
        cases.append(pytest.param(name, marks=marks, id=name))
    return cases


def test_every_block_is_known():
    blocks = {name: read_blocks(name) for name in list_pages()}
    assert {block.language for page in blocks.values() for block in page} - {*RUN, *SHOWN} == set()
    counts = {name: sum(block.language in RUN for block in page) for name, page in blocks.items()}
    assert {name: count for name, count in counts.items() if count} == {
        name: page.blocks for name, page in PAGES.items()
    }


def test_files_that_are_linked_exist():
    links = {(name, link.partition('#')[0]) for name in list_pages() for link in read_links(name)}
    assert len(links) >= 100
    assert [pair for pair in links if pair[1] and not ((ROOT / pair[0]).parent / pair[1]).is_file()] == []


@pytest.fixture(scope='session')
def clone(tmp_path_factory):
    """A copy of the tracked files, so that pages may write into it."""
    folder = tmp_path_factory.mktemp('docs') / 'clone'
    listed = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, check=True, text=True)
    for name in filter(None, listed.stdout.split('\0')):
        if (ROOT / name).is_file() and not name.startswith('tests/'):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.fixture
def place(clone, tmp_path):
    """The folder that a page runs in; `run_script` makes it the current one."""
    for path in clone.iterdir():
        (tmp_path / path.name).symlink_to(path)
    write_images(tmp_path / 'photos', num_train=90)
    return tmp_path


def find_script(words):
    """Return the index of the script among the words of a command, None if it is none that runs here."""
    names = [word if word in SCRIPTS else Path(word).name for word in words]
    return next((idx for idx, name in enumerate(names) if name in SCRIPTS), None)


def run_command(run_script, words, flags):
    idx = find_script(words)
    if idx is None:
        assert words[0] in FILE_COMMANDS, f'not a command that runs here: {words}'
        subprocess.run(words, check=True)
        return
    name = words[idx] if words[idx] in SCRIPTS else Path(words[idx]).name
    command = f'{name} {words[idx + 1]}' if name == 'timm-multiexit' else name
    is_loading = command in ('train.py', 'validate.py', 'timm-multiexit train', 'timm-multiexit validate')
    added = [*(['-j', '0'] if is_loading else []), *shlex.split(flags.get(command, ''))]
    code, _, err = run_script(SCRIPTS[name], *words[idx + 1 :], *added)
    assert code == 0, f'{words}: {err}'


def is_inside(module, folder):
    file = getattr(module, '__file__', None)
    return file is not None and folder in Path(file).resolve().parents


def run_block(block, page, name, names, run_script):
    """Run a block, except for what is listed, and return which of the list it has."""
    if block.language == 'shell' and not block.text.startswith('#!'):
        commands = dict(read_commands(block))
        for printed, words in commands.items():
            if printed not in page.not_run:
                run_command(run_script, words, page.flags)
        return page.not_run.keys() & commands.keys()
    listed = page.not_run.keys() & set(block.text.splitlines())
    if page.path and Path(page.path).is_dir():
        sys.path.insert(0, str(Path(page.path).resolve()))
    if not listed:  # at its place in the page, for tracebacks and for code that is read again
        source = '\n' * (block.line - 1) + block.text
        exec(compile(source, str(ROOT / name), 'exec'), names)
    return listed


@pytest.fixture
def run_page(run_script, place, hub, monkeypatch):
    """Return a function that runs a page and returns the names that its Python defined."""
    monkeypatch.setattr(sys, 'path', sys.path[:])

    def run(name):
        page, names, skipped = PAGES[name], {'__name__': '__main__'}, set()
        for prepare in page.prepare:
            prepare(run_script, hub)
        for block in read_blocks(name):
            if block.language in RUN:
                skipped |= run_block(block, page, name, names, run_script)
        assert skipped == set(page.not_run)
        return names

    yield run
    for name in [name for name, module in sys.modules.items() if is_inside(module, place)]:
        del sys.modules[name]  # a page's own module


def check_readme(names, place, hub):
    assert names['name'] == 'church'
    assert names['model'].policy is not None
    assert [tuple(logits.shape) for logits in names['outputs'].logits] == [(2, 10)] * 4
    plain = timm.create_model('local-dir:hub/checkpoints/imagenette_lite0_eed', pretrained=True).eval()
    assert torch.equal(plain(names['images']), names['main'])
    assert names['first'].shape == names['main'].shape == (1, 10)


def check_train(names, place, hub):
    # plain timm's network is the main one
    assert torch.equal(
        names['plain'].eval()(names['images']),
        names['tme'].create_model('local-dir:output/train/mine/best', pretrained=True).eval()(names['images']),
    )
    run = place / 'output/train/mine'
    for name in ('best', 'results.json', 'summary.csv', 'curves.png', 'args.yaml', 'last.pth.tar'):
        assert (run / name).exists()


def check_infer(names, place, hub):
    assert [names['names'][idx] for idx in names['prediction'].logits.argmax(-1)] == [
        'church',
        'golf_ball',
        'parachute',
    ]
    assert names['tme'].create_model('local-dir:calibrated', pretrained=True).policy is not None
    assert (place / 'results/accuracy_vs_macs.png').is_file()


def check_own_network(names, place, hub):
    loaded, plain = names['model'].eval(), names['plain'].eval()
    assert loaded.module_info.classifiers == ('net.fc',)
    assert names['prediction'].logits.shape == names['early'].shape == (8, 4)
    saved = names['tme'].load_exits(names['Net'](), 'my-net').eval()
    assert torch.equal(saved(names['images']), plain(names['images']))


def check_own_loop(names, place, hub):
    merged = names['tme'].create_model('local-dir:merged', pretrained=True).eval()
    batch = torch.randn(2, *merged.input_size)
    assert torch.equal(merged(batch, exit_idx=0), names['merged'].eval()(batch, exit_idx=0))
    trained, theirs = (timm.create_model(f'local-dir:{name}', pretrained=True).eval() for name in ('trained', 'theirs'))
    assert torch.equal(trained(names['images']), theirs(names['images']))


def check_quickstart(names, place, hub):
    assert names['name'] == 'cat'  # the photos are a red and a green noise
    assert names['model'].policy is not None
    assert (place / 'output/train/photos/accuracy_vs_macs.png').is_file()


def check_publish(names, place, hub):
    published = place / 'output/train/mine/publication'
    assert {path.name for path in published.iterdir()} == {
        *('model.safetensors', 'exits.safetensors', 'config.json', 'args.yaml', 'metrics.json', 'README.md', 'assets')
    }
    assert hub.repositories['org/calibrated'].is_private
    assert names['model'].hub_commit


CHECKS = {
    'README.md': check_readme,
    'docs/infer.md': check_infer,
    'docs/own_loop.md': check_own_loop,
    'docs/own_network.md': check_own_network,
    'docs/publish.md': check_publish,
    'docs/quickstart.md': check_quickstart,
    'docs/train.md': check_train,
}


@pytest.mark.parametrize('name', list_cases())
def test_blocks_run_in_order(name, run_page, place, hub, capsys):
    for library in PAGES[name].libraries:
        pytest.importorskip(library)
    names = run_page(name)
    if PAGES[name].shows_output:
        printed = capsys.readouterr().out
        shown = [block.text for block in read_blocks(name) if block.language == 'text']
        assert shown
        assert [text for text in shown if text not in printed] == []
    if name in CHECKS:
        CHECKS[name](names, place, hub)


def run_in_clone(folder, command):
    """Run a command of bash in a clone, in the environment of a user; returns what it printed."""
    if shutil.which('git') is None or shutil.which('pip') is None:
        pytest.skip('a clone needs git, and the commands pip')
    if not folder.exists():
        subprocess.run(['git', 'clone', '-q', ROOT, folder], check=True)
    hidden = ('VIRTUAL_ENV', 'PYTHONPATH')
    env = {key: value for key, value in os.environ.items() if key not in hidden}
    env['OMP_NUM_THREADS'] = '1'  # other tests run beside it
    done = subprocess.run(['bash', '-c', command], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_quickstart_runs_as_printed_in_a_fresh_clone(run_script, hub, tmp_path):
    serve_backbone(run_script, hub)
    clone = tmp_path / 'clone'
    install, *blocks = [block for block in read_blocks('docs/quickstart.md') if block.language in RUN]
    run_in_clone(clone, install.text)
    write_images(clone / 'photos', num_train=45)
    for block in blocks:
        text = block.text if block.language == 'shell' else f'uv run python - <<"END"\n{block.text}\nEND'
        printed = run_in_clone(clone, f'set -e\n{text}')
    assert 'exit' in printed
    assert (clone / 'net/manifest.json').is_file()


@pytest.mark.slow
def test_first_command_trains_from_a_fresh_clone(tmp_path):
    command = next(block.text for block in read_blocks('README.md') if 'accelerate launch train.py' in block.text)
    printed = run_in_clone(tmp_path / 'clone', command)
    rows = {
        line.split()[0]: line.split()
        for line in printed.splitlines()
        if line[:4].strip() in ('0', '1', '2', 'main', 'ens')
    }
    assert list(rows) == ['0', '1', '2', 'main', 'ens']
    assert float(rows['main'][5]) >= 97.0
    assert not subprocess.run(
        ['git', 'status', '--porcelain'], cwd=tmp_path / 'clone', capture_output=True, text=True
    ).stdout.strip()
