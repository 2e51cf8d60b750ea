"""A truncated model comes back from a folder with the very weights and answers, and the folder is not trusted."""

import json

import pytest
import safetensors.torch
import timm
import torch
from helpers.untrusted import check_refusal, limited_memory

import timm_multiexit as tme
from timm_multiexit.checkpoints.config import read_model_config


def load(folder, **kwargs):
    return tme.create_model(f'local-dir:{folder}', **{'pretrained': True, **kwargs})


def images(model, count=2):
    return torch.randn(count, *model.input_size)


@pytest.fixture
def saved(make_model, tmp_path):
    """Return the truncated model of exit 1, and its folder."""
    network = tme.truncate(make_model(input_size=None).eval(), 1)
    tme.save_pretrained(network, tmp_path / 'net')
    return network, tmp_path / 'net'


@pytest.mark.parametrize(
    ('name', 'exit_idx'), [('test_resnet', 0), ('test_resnet', -1), ('test_vit', 2), ('test_convnext', 1)]
)
def test_truncated_model_comes_back_equal(name, exit_idx, make_model, tmp_path):
    model = make_model(name, input_size=None).eval()
    network = tme.truncate(model, exit_idx)
    tme.save_pretrained(network, tmp_path)
    loaded = load(tmp_path).eval()
    assert isinstance(loaded, tme.TruncatedModel)
    assert (loaded.exit_idx, loaded.spec, loaded.input_size) == (network.exit_idx, network.spec, network.input_size)
    state, own = network.state_dict(), loaded.state_dict()
    assert own.keys() == state.keys()
    assert all(torch.equal(own[key], state[key]) for key in state)
    x = images(model)
    with torch.no_grad():
        assert torch.equal(loaded(x), network(x))
        assert torch.equal(loaded(x), model(x, exit_idx=exit_idx))
        assert torch.equal(loaded.forward_head(loaded.forward_features(x)), loaded(x))


def test_tables_that_no_file_has_are_computed_anew(make_backbone, tmp_path):
    backbone = make_backbone('swin_tiny_patch4_window7_224', img_size=56, embed_dim=24, num_heads=(1, 1, 1, 1))
    network = tme.truncate(tme.attach_exits(backbone, [1]).eval(), 0)
    tables = {name for name, _ in network.named_buffers()} - network.state_dict().keys()
    assert any(name.endswith('relative_position_index') for name in tables)
    tme.save_pretrained(network, tmp_path)
    loaded = load(tmp_path, embed_dim=24, num_heads=(1, 1, 1, 1)).eval()
    mine, own = dict(loaded.named_buffers()), dict(network.named_buffers())
    assert all(torch.equal(mine[name], own[name]) for name in tables)
    x = torch.randn(1, 3, 56, 56)
    assert torch.equal(loaded(x), network(x))


def test_folder_holds_the_truncated_weights_alone(saved):
    network, folder = saved
    tensors = safetensors.torch.load_file(folder / 'model.safetensors')
    assert {path.name for path in folder.iterdir()} == {'config.json', 'model.safetensors'}
    assert tensors.keys() == network.state_dict().keys()
    config = read_model_config(folder)
    assert (config.architecture, config.exits) == ('test_resnet', None)
    assert (config.truncated.exit_idx, config.truncated.specs) == (1, (network.spec,))


def test_plain_timm_says_who_reads_the_folder(saved):
    _, folder = saved
    for pretrained in (True, False):
        with pytest.raises(
            RuntimeError, match=r'Unknown model \(test_resnet cut at exit 1, for timm_multiexit alone\)'
        ):
            timm.create_model(f'local-dir:{folder}', pretrained=pretrained)


def test_plain_timm_loads_main(make_model, tmp_path):
    model = make_model().eval()
    tme.save_pretrained(tme.truncate(model, -1), tmp_path)
    x = images(model)
    assert torch.equal(timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()(x), model(x))


def test_fine_tuned_model_comes_back_again(saved, tmp_path):
    _, folder = saved
    network = load(folder)
    assert network.training
    assert all(param.requires_grad and param.is_leaf for param in network.parameters())
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    torch.nn.functional.cross_entropy(network(images(network, 4)), torch.arange(4)).backward()
    optimizer.step()
    tme.save_pretrained(network, tmp_path / 'tuned')
    loaded, x = load(tmp_path / 'tuned').eval(), images(network)
    assert not torch.equal(loaded(x), load(folder).eval()(x))
    assert torch.equal(loaded(x), network.eval()(x))


def test_checkpoints_of_it_and_of_the_whole_go_into_it(make_model, saved, tmp_path):
    network, folder = saved
    other = make_model(input_size=None).eval()
    torch.save({'state_dict': network.state_dict()}, tmp_path / 'own.pth.tar')
    torch.save({'state_dict': other.state_dict()}, tmp_path / 'whole.pth.tar')
    loaded, x = load(folder, pretrained=False).eval(), images(network)
    assert not torch.equal(loaded(x), network(x))
    tme.load_checkpoint(loaded, tmp_path / 'own.pth.tar')
    assert torch.equal(loaded(x), network(x))
    tme.load_checkpoint(loaded, tmp_path / 'whole.pth.tar')
    assert torch.equal(loaded(x), other(x, exit_idx=1))


def test_keywords_that_keep_the_weights_are_taken_and_others_refused(saved):
    network, folder = saved
    loaded = load(folder, drop_rate=0.25, drop_path_rate=0.1, in_chans=3, num_classes=10)
    assert loaded.head.drop.p == 0.25
    x = images(network)
    assert torch.equal(loaded.eval()(x), network(x))
    for kwargs in ({'num_classes': 7}, {'in_chans': 1}, {'global_pool': 'max'}):
        with pytest.raises(tme.MultiExitError, match=f'{next(iter(kwargs))} must be that of the truncated model'):
            load(folder, **kwargs)
    assert load(folder, pretrained=False, num_classes=7)(x).shape == (2, 7)


def test_exits_are_not_attached_to_it(saved):
    _, folder = saved
    with pytest.raises(tme.MultiExitError, match='a truncated model without further exits'):
        load(folder, exits='auto')


def edit(folder, change):
    config = json.loads((folder / 'config.json').read_text())
    change(config)
    (folder / 'config.json').write_text(json.dumps(config))


def cut(**values):
    return lambda config: config['multiexit']['truncated'].update(values)


def spec(**values):
    return lambda config: config['multiexit']['exits'][0].update(values)


HOSTILE = {
    'giant': cut(architecture='vit_giant_patch14_dinov2'),
    'other': cut(architecture='test_vit'),
    'unknown': cut(architecture='os.system'),
    'number': cut(architecture=7),
    'nameless': lambda config: config['multiexit']['truncated'].pop('architecture'),
    'exit': cut(exit=0),
    'exit of text': cut(exit='1'),
    'exit far': cut(exit=10**9),
    'exit negative': cut(exit=-1),
    'not an object': lambda config: config['multiexit'].update(truncated=[1]),
    'text': lambda config: config['multiexit'].update(truncated='yes'),
    'two exits': lambda config: config['multiexit']['exits'].append(
        {**config['multiexit']['exits'][0], 'module': 'layer3.0'}
    ),
    'no exit': lambda config: config['multiexit'].update(exits=[]),
    'deeper tap': spec(module='layer4.0', channels=96, reduction=32),
    'no such tap': spec(module='nowhere'),
    'width': spec(widths=[16_384] * 3),
    'head': spec(head='os.system'),
    'newer': lambda config: config['multiexit'].update(format_version=2),
    'keyword': lambda config: config['model_args'].update(block_args={}),
    'classes': lambda config: config.update(num_classes=9),
    'url': lambda config: config['pretrained_cfg'].update(url='http://localhost:9/x.pth'),
}


@pytest.mark.parametrize('kind', HOSTILE)
def test_folder_that_does_not_hold_what_it_says_is_refused(kind, saved):
    _, folder = saved
    edit(folder, HOSTILE[kind])
    with limited_memory(), pytest.raises(tme.MultiExitError) as caught:
        load(folder)
    check_refusal(caught.value)


def test_whole_network_is_never_made(make_empty, tmp_path):
    """Of a `vit_base` the first block alone takes memory."""
    backbone = timm.create_model('vit_base_patch16_224', num_classes=5, img_size=64)
    network = tme.truncate(tme.attach_exits(backbone, ['blocks.0'], head='linear').eval(), 0)
    tme.save_pretrained(network, tmp_path)
    del backbone
    with limited_memory(limit=120 << 20):  # 31 MiB of weights; 340 of the whole
        loaded = load(tmp_path).eval()
    x = images(network, 1)
    assert torch.equal(loaded(x), network(x))


@pytest.mark.parametrize('name', ['model.safetensors', 'config.json'])
def test_pointer_of_git_lfs_says_what_to_run(name, saved):
    _, folder = saved
    (folder / name).write_text(f'version https://git-lfs.github.com/spec/v1\noid sha256:{"0" * 64}\nsize 123\n')
    with pytest.raises(tme.CheckpointError, match=r'is a git-LFS pointer and holds no weights: run `git lfs pull`'):
        load(folder)


def test_nan_is_refused(saved):
    _, folder = saved
    tensors = safetensors.torch.load_file(folder / 'model.safetensors')
    tensors['exits.1.fc.bias'][0] = float('nan')
    safetensors.torch.save_file(tensors, folder / 'model.safetensors')
    with pytest.raises(tme.CheckpointError, match='contains NaN or inf'):
        load(folder)


def test_network_whose_tables_cannot_be_computed_is_refused_before_anything_is_written(saved, tmp_path):
    network, _ = saved
    network.backbone.register_buffer('table', torch.ones(3), persistent=False)
    with pytest.raises(tme.CheckpointError, match=r'backbone\.table of the truncated model cannot be computed anew'):
        tme.save_pretrained(network, tmp_path / 'other')
    assert not (tmp_path / 'other').exists()
