"""Checkpoints that others write: Lightning's, timm's with numpy's numbers, bare ones, git-LFS's pointers."""

import logging
from argparse import Namespace

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from timm.models import adapt_input_conv

import timm_multiexit as tme
from timm_multiexit.checkpoints.timm_checkpoint import build_exits, read_training_checkpoint
from timm_multiexit.cli.flags.validate_args import create_validate_parser
from timm_multiexit.cli.validate import create_evaluated_model


@pytest.fixture
def model(make_model):
    return make_model().eval()


@pytest.fixture
def fresh(make_model):
    torch.manual_seed(1)
    return make_model().eval()


def put(state, prefix):
    return {f'{prefix}{key}': tensor for key, tensor in state.items()}


def same(first, second, *, prefix=''):
    second = second.state_dict()
    return all(torch.equal(tensor, second[f'{prefix}{key}']) for key, tensor in first.state_dict().items())


@pytest.mark.parametrize('prefix', ['model.', 'net.', 'model._orig_mod.', 'module.model.', 'a.b.c.'])
def test_weights_of_a_lightning_module_around_the_model(prefix, model, fresh, tmp_path, caplog):
    state = put(model.state_dict(), prefix) | {'criterion.weight': torch.ones(10), 'train_acc.total': torch.ones(())}
    torch.save({'state_dict': state, 'epoch': 3, 'pytorch-lightning_version': '2.6.6'}, tmp_path / 'last.ckpt')
    caplog.set_level(logging.INFO)
    assert not same(model, fresh)
    tme.load_checkpoint(fresh, tmp_path / 'last.ckpt')
    assert same(model, fresh)
    # timm takes 'module.' away itself.
    assert f"below '{prefix.removeprefix('module.')}' are taken" in caplog.text


@pytest.mark.parametrize('prefix', ['model.', 'backbone.', 'model.backbone.', 'net.encoder.'])
def test_weights_of_a_lightning_module_around_a_plain_timm_model(prefix, model, fresh, tmp_path):
    torch.save({'state_dict': put(model.backbone.state_dict(), prefix)}, tmp_path / 'last.ckpt')
    heads = {key: tensor.clone() for key, tensor in fresh.exits.state_dict().items()}
    tme.load_checkpoint(fresh, tmp_path / 'last.ckpt')
    assert same(model.backbone, fresh.backbone)
    assert all(torch.equal(tensor, heads[key]) for key, tensor in fresh.exits.state_dict().items())
    plain = timm.create_model('test_resnet', num_classes=10)
    tme.load_checkpoint(plain, tmp_path / 'last.ckpt')
    assert same(model.backbone, plain)


def test_one_of_several_models_in_a_file_is_not_guessed(model, fresh, tmp_path):
    state = put(model.state_dict(), 'student.') | put(fresh.state_dict(), 'teacher.')
    torch.save({'state_dict': state}, tmp_path / 'last.ckpt')
    with pytest.raises(
        tme.CheckpointError, match=r"got 2, below 'student\.backbone\.', 'teacher\.backbone\.': save the"
    ):
        tme.load_checkpoint(fresh, tmp_path / 'last.ckpt')


def test_other_exits_below_a_prefix_are_not_left_out_in_silence(model, make_model, tmp_path):
    torch.save({'state_dict': put(model.state_dict(), 'model.')}, tmp_path / 'last.ckpt')
    for other in (make_model(exits=[1]), timm.create_model('test_resnet', num_classes=10)):
        with pytest.raises(tme.CheckpointError, match=r'weights are missing .* are unknown'):
            tme.load_checkpoint(other, tmp_path / 'last.ckpt')


NUMBERS = {
    'float64': np.float64(71.5),
    'float32': np.float32(71.5),
    'int64': np.int64(3),
    'bool': np.bool_(True),
}


@pytest.mark.parametrize('kind', NUMBERS)
def test_numbers_of_numpy_beside_the_weights_are_read(kind, model, fresh, tmp_path):
    state = {
        'state_dict': model.state_dict(),
        'metric': NUMBERS[kind],
        'epoch': 3,
        'args': Namespace(model='test_resnet'),
    }
    torch.save(state, tmp_path / 'last.pth.tar')
    tme.load_checkpoint(fresh, tmp_path / 'last.pth.tar')
    assert same(model, fresh)
    read = read_training_checkpoint(tmp_path / 'last.pth.tar')
    assert read['metric'] == NUMBERS[kind]
    assert type(read['metric']) is type(NUMBERS[kind])


def test_numbers_pickled_by_numpy_1_are_read(tmp_path):
    torch.save(
        {'state_dict': {}, 'metric': np.float64(71.5)}, tmp_path / 'new.pth.tar', _use_new_zipfile_serialization=False
    )
    content = (tmp_path / 'new.pth.tar').read_bytes()
    (tmp_path / 'old.pth.tar').write_bytes(content.replace(b'numpy._core.multiarray', b'numpy.core.multiarray'))
    allowed = set(torch.serialization.get_safe_globals())
    for name in ('old', 'new'):
        assert timm_metric(tmp_path / f'{name}.pth.tar') == 71.5
    assert set(torch.serialization.get_safe_globals()) == allowed


def timm_metric(path):
    return read_training_checkpoint(path)['metric']


class Code:
    def __reduce__(self):
        return print, ('code ran',)


def test_code_is_still_refused(model, tmp_path, capsys):
    torch.save({'state_dict': model.state_dict(), 'metric': Code()}, tmp_path / 'last.pth.tar')
    with pytest.raises(tme.CheckpointError, match='Cannot read checkpoint'):
        tme.load_checkpoint(model, tmp_path / 'last.pth.tar')
    assert capsys.readouterr().out == ''


@pytest.mark.parametrize('name', ['last.pth.tar', 'net.pth', 'model.safetensors', 'last.ckpt'])
def test_pointer_of_git_lfs_is_named(name, model, tmp_path):
    pointer = f'version https://git-lfs.github.com/spec/v1\noid sha256:{"0" * 64}\nsize 123\n'
    (tmp_path / name).write_text(pointer)
    for read in (lambda path: tme.load_checkpoint(model, path), read_training_checkpoint):
        with pytest.raises(tme.CheckpointError) as error:
            read(tmp_path / name)
        assert str(error.value) == (
            f'{tmp_path / name} is a git-LFS pointer and holds no weights: run `git lfs pull` in {tmp_path}.'
        )


@pytest.mark.parametrize(
    'value', [[1, 2], None, {'saver': [1]}, {}, {'state_dict': None}, {'state_dict': [1]}, 'text'], ids=str
)
def test_file_without_weights_is_one_line(value, model, tmp_path):
    torch.save(value, tmp_path / 'last.pth.tar')
    with pytest.raises(tme.CheckpointError, match=r'holds no weights|Cannot read checkpoint') as error:
        tme.load_checkpoint(model, tmp_path / 'last.pth.tar')
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('value', [[1, 2], None, 'text', 7], ids=str)
def test_training_checkpoint_must_be_a_dict(value, tmp_path):
    torch.save(value, tmp_path / 'last.pth.tar')
    with pytest.raises(tme.CheckpointError, match='must hold a dict, got'):
        read_training_checkpoint(tmp_path / 'last.pth.tar')


@pytest.mark.parametrize(('there', 'here'), [(3, 1), (1, 3), (3, 4), (4, 3)])
def test_first_convolution_of_other_channels_is_adapted_as_timm_does(there, here, tmp_path, caplog):
    model = tme.create_model('test_resnet', num_classes=5, in_chans=there)
    other = tme.create_model('test_resnet', num_classes=5, in_chans=here)
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'whole.pth.tar')
    torch.save(model.backbone.state_dict(), tmp_path / 'plain.pth')
    expected = adapt_input_conv(here, model.backbone.conv1[0].weight.detach(), base_chans=there)
    for name in ('whole.pth.tar', 'plain.pth'):
        torch.nn.init.zeros_(other.backbone.conv1[0].weight)
        tme.load_checkpoint(other, tmp_path / name)
        assert torch.equal(other.backbone.conv1[0].weight, expected)
        assert torch.equal(other.backbone.fc.weight, model.backbone.fc.weight)
        assert f'is for images of {there} channels, the model for {here}' in caplog.text
        caplog.clear()


HEADS = {
    'auto': {},
    'one': {'exits': 1},
    'two': {'exits': 2, 'head': 'linear'},
    'paper': {'head': 'paper'},
    'bottleneck': {'head': 'bottleneck'},
    'own widths': {'head_widths': [[8, 8, 8, 8], [48, 8, 8], [8, 16]]},
}


@pytest.mark.parametrize('kind', HEADS)
def test_exits_are_built_from_the_weights_of_a_file_that_does_not_say_where_they_are(kind, make_model, tmp_path):
    model = make_model(**HEADS[kind]).eval()
    torch.save({'state_dict': put(model.state_dict(), 'model.' if kind == 'one' else '')}, tmp_path / 'last.pth.tar')
    built = build_exits(timm.create_model('test_resnet', num_classes=10), tmp_path / 'last.pth.tar').eval()
    assert built.exits.specs == model.exits.specs
    tme.load_checkpoint(built, tmp_path / 'last.pth.tar')
    x = torch.randn(2, 3, 64, 64)
    assert all(map(torch.equal, built(x, exits=True).logits, model(x, exits=True).logits))


def test_exits_elsewhere_are_refused_with_the_flags_to_give(make_model, tmp_path):
    model = make_model(exits=['layer3.0'], head='linear')
    safetensors.torch.save_file(model.state_dict(), tmp_path / 'net.safetensors')
    with pytest.raises(tme.CheckpointError, match=r'weights of 1 exits and does not say where .* give --exits'):
        build_exits(timm.create_model('test_resnet', num_classes=10), tmp_path / 'net.safetensors')


def test_file_without_exits_gives_none(model, tmp_path):
    torch.save(model.backbone.state_dict(), tmp_path / 'plain.pth')
    assert len(build_exits(timm.create_model('test_resnet', num_classes=10), tmp_path / 'plain.pth').exits) == 0


def evaluate_args(*argv):
    return create_validate_parser('validate.py').parse_args([str(arg) for arg in argv])


@pytest.mark.parametrize('args', [None, {'model': 'test_vit'}, 'text', 'missing'], ids=str)
def test_validate_takes_checkpoints_without_arguments_of_a_run(args, model, tmp_path):
    state = {'state_dict': model.state_dict(), 'args': args}
    torch.save(state if args != 'missing' else {'state_dict': model.state_dict()}, tmp_path / 'last.pth.tar')
    argv = ('--model', 'test_resnet', '--num-classes', 10, '--checkpoint', tmp_path / 'last.pth.tar')
    loaded = create_evaluated_model(evaluate_args(*argv))
    assert loaded.exits.specs == model.exits.specs
    assert same(model, loaded)


def test_validate_takes_safetensors_as_checkpoint(model, tmp_path):
    safetensors.torch.save_file(model.state_dict(), tmp_path / 'net.safetensors')
    argv = ('--model', 'test_resnet', '--num-classes', 10, '--checkpoint', tmp_path / 'net.safetensors')
    assert same(model, create_evaluated_model(evaluate_args(*argv)))
