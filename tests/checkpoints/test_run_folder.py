"""The files of a run: where they are, and how they are read."""

import json

import pytest
import timm
import torch
import yaml

from timm_multiexit.checkpoints.run_folder import RunFolder, read_origin
from timm_multiexit.checkpoints.save import save_pretrained
from timm_multiexit.models.origin import Origin
from timm_multiexit.utils.errors import CheckpointError

ARGS = {'model': 'test_resnet', 'seed': 42, 'exit_loss': 'eed', 'exits': 'auto'}


@pytest.fixture
def run(tmp_path):
    """A folder with the small files of a run."""
    (tmp_path / 'args.yaml').write_text(yaml.safe_dump(ARGS))
    (tmp_path / 'summary.csv').write_text(
        'epoch,train_loss,eval_top1\n0,2.5,\nepoch,train_loss,eval_top1\n1,nan,50.0\n,,\n'
    )
    (tmp_path / 'results.json').write_text(json.dumps({'rows': []}))
    return RunFolder(tmp_path)


def test_files_are_read(run):
    assert run.read_args() == ARGS
    assert run.read_results() == {'rows': []}
    first, second = run.read_summary()
    assert first == {'epoch': 0, 'train_loss': 2.5}
    assert (second['epoch'], second['eval_top1'], second['train_loss'] != second['train_loss']) == (1, 50.0, True)
    assert type(first['epoch']) is int


def test_names_of_files(run, tmp_path):
    paths = (run.args_path, run.summary_path, run.results_path, run.validation_path, run.best)
    names = ('args.yaml', 'summary.csv', 'results.json', 'validation.json', 'best')
    assert paths == tuple(tmp_path / name for name in names)


@pytest.mark.parametrize('name', ['summary.csv', 'last.pth.tar', None])
def test_folder_holds_a_run_once_there_is_a_summary_or_a_checkpoint(tmp_path, name):
    (tmp_path / 'args.yaml').touch()
    if name:
        (tmp_path / name).touch()
    assert RunFolder(tmp_path).holds_run == bool(name)
    assert not RunFolder(tmp_path / 'nowhere').holds_run


@pytest.mark.parametrize(
    ('name', 'content', 'read', 'message'),
    [
        ('args.yaml', None, RunFolder.read_args, 'is not a training run: it has no args.yaml'),
        ('args.yaml', 'a: [', RunFolder.read_args, 'is not a training run: .*args.yaml must be a YAML file'),
        ('args.yaml', '- 1', RunFolder.read_args, 'args.yaml must be a mapping'),
        (
            'args.yaml',
            'model: resnet18',
            RunFolder.read_args,
            'is not the args.yaml of a training run: it has no exit_loss',
        ),
        ('summary.csv', None, RunFolder.read_summary, 'summary.csv cannot be read: No such file or directory'),
        ('summary.csv', 'epoch,a\n0,b\n', RunFolder.read_summary, "could not convert string to float: 'b'"),
        ('results.json', None, RunFolder.read_results, 'has no results.json, which training writes when it ends'),
        ('results.json', '[1]', RunFolder.read_results, 'must hold a JSON object'),
    ],
)
def test_what_cannot_be_read_is_one_line(run, name, content, read, message):
    if content is None:
        (run.path / name).unlink()
    else:
        (run.path / name).write_text(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read(run)
    assert '\n' not in str(caught.value)


def test_needed_arguments_can_be_named(run):
    (run.path / 'args.yaml').write_text('model: resnet18')
    assert run.read_args(needed=()) == {'model': 'resnet18'}
    with pytest.raises(CheckpointError):
        run.read_args(needed=('model', 'split'))


@torch.no_grad()
def test_best_network_is_loaded_with_and_without_exits(make_model, run):
    model = make_model().eval()
    images = torch.randn(2, 3, 32, 32)
    save_pretrained(model, run.best)
    assert all(map(torch.equal, run.load_best().eval()(images, exits=True).logits, model(images, exits=True).logits))
    plain = timm.create_model('test_resnet', num_classes=3).eval()
    (run.best / 'exits.safetensors').unlink()
    save_pretrained(plain, run.best)
    loaded = run.load_best().eval()
    assert len(loaded.exits) == 0
    assert torch.equal(loaded(images), plain(images))


def test_origin_in_arguments():
    assert read_origin({'origin': {'base': 'org/net', 'license': 'mit'}}) == Origin('org/net', 'mit')
    assert read_origin({'origin': Origin('org/net', 'mit', 'c0ffee').to_dict()}).commit == 'c0ffee'
    assert read_origin({'model': 'resnet18'}) == Origin('a file')


WRONG_ARGS = {
    'model': ({'model': 5}, 'model in .*args.yaml must be text, got 5'),
    'seed': ({'seed': [1]}, r'seed in .*args.yaml must be an integer, got \[1\]'),
    'truth': ({'seed': True}, 'seed in .*args.yaml must be an integer, got True'),
    'loss': ({'exit_loss': {}}, 'exit_loss in .*args.yaml must be text, got {}'),
    'config': ({'config': 1}, 'config in .*args.yaml must be text, got 1'),
    'origin': ({'origin': 'x'}, "origin in .*args.yaml must be a mapping of base, license and commit to text, got 'x'"),
    'origin-key': ({'origin': {'bases': 'x'}}, 'origin in .*args.yaml must be a mapping of base, license and commit'),
    'origin-value': ({'origin': {'base': ['x']}}, 'origin in .*args.yaml must be a mapping of base, license'),
    'weight': ({'exit_output_weight': 'x'}, "exit_output_weight in .*args.yaml must be a number, got 'x'"),
    'kwargs': ({'model_kwargs': {1: 2}}, 'model_kwargs in .*args.yaml must be a mapping of names, got {1: 2}'),
    'exits': ({'exits': {'a': 1}}, "exits in .*args.yaml must be text or a list, got {'a': 1}"),
}


@pytest.mark.parametrize(('values', 'message'), WRONG_ARGS.values(), ids=WRONG_ARGS)
def test_argument_of_the_wrong_kind_is_one_line(run, values, message):
    (run.path / 'args.yaml').write_text(yaml.safe_dump(ARGS | values))
    with pytest.raises(CheckpointError, match=message) as caught:
        run.read_args()
    assert '\n' not in str(caught.value)
