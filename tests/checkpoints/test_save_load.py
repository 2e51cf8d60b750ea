import errno
import hashlib
import json
import shutil
from argparse import Namespace

import pytest
import safetensors.torch
import timm
import torch

import timm_multiexit as tme
from timm_multiexit.checkpoints.config import read_model_config
from timm_multiexit.checkpoints.load import load_pretrained
from timm_multiexit.checkpoints.save import hash_weights, save_policy
from timm_multiexit.checkpoints.timm_checkpoint import read_training_checkpoint, restore_exits
from timm_multiexit.policies.budgets import BudgetTable, PolicyResult
from timm_multiexit.policies.policy import ExitPolicy
from timm_multiexit.utils.errors import DiskError, InvalidTypeError, InvalidValueError, MissingFileError, MultiExitError


def make_model(**kwargs):
    model = tme.create_model('test_resnet', num_classes=5, input_size=(3, 64, 64), **kwargs)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()  # so that lost statistics show
    return model.eval()


@pytest.fixture
def folder(tmp_path):
    model = make_model()
    tme.save_pretrained(model, tmp_path / 'net')
    return model, tmp_path / 'net'


def equal_outputs(first, second, images):
    with torch.no_grad():
        return all(
            torch.equal(a, b) for a, b in zip(first(images, exits=True).logits, second(images, exits=True).logits)
        )


def test_classifiers_are_left_out_and_put_in(folder, tmp_path):
    model, path = folder
    without = tme.create_model(f'local-dir:{path}', pretrained=True, num_classes=0)
    assert without(torch.randn(1, 3, 64, 64)).shape == (1, model.backbone.num_features)
    tme.save_pretrained(without, tmp_path / 'without')
    fresh = tme.create_model(f'local-dir:{tmp_path}/without', pretrained=True, num_classes=7)
    assert [each.shape for each in fresh(torch.randn(1, 3, 64, 64), exits=True).logits] == [(1, 7)] * 4
    kept = [name for name, _ in model.exits.named_parameters() if '.fc.' not in name]
    assert len(kept) > 10
    for name in kept:
        assert torch.equal(fresh.exits.get_parameter(name), model.exits.get_parameter(name))


def test_size_that_costs_are_of_comes_back_and_can_be_another(folder):
    model, path = folder
    assert model.input_size == (3, 64, 64)
    loaded = tme.create_model(f'local-dir:{path}', pretrained=True)
    assert (loaded.input_size, loaded.cost()) == (model.input_size, model.cost())
    other = tme.create_model(f'local-dir:{path}', pretrained=True, input_size=(1, 32, 32))
    assert (other.input_size, other.in_chans) == ((1, 32, 32), 1)
    assert other.cost()[-1].fixed.macs < model.cost()[-1].fixed.macs / 3


@pytest.mark.parametrize('given', [{'head': 'linear'}, {'head_widths': [[8, 16]]}, {'head': 'nonsense'}], ids=str)
def test_heads_of_a_folder_are_not_chosen(given, folder):
    (name,) = given
    with pytest.raises(InvalidValueError, match=f'^{name} must be left out for local-dir:.*, which has exits, got'):
        tme.create_model(f'local-dir:{folder[1]}', **given)
    assert tme.create_model(f'local-dir:{folder[1]}', exits=1, head='linear').exits.specs[0].head == 'linear'


@pytest.mark.parametrize('rate', [2, -0.5, 'much'])
def test_drop_rate_is_checked_for_folders_too(rate, folder):
    with pytest.raises((InvalidValueError, InvalidTypeError), match='^drop_rate must be'):
        tme.create_model(f'local-dir:{folder[1]}', drop_rate=rate)


def test_folder_is_no_mixture_if_its_files_are_not_all_moved(folder, monkeypatch):
    _, path = folder
    move, moved = shutil.move, []

    def stop(source, target):
        if moved:
            raise OSError(errno.ENOSPC, 'No space left on device')
        moved.append(target)
        return move(source, target)

    monkeypatch.setattr(shutil, 'move', stop)
    with pytest.raises(DiskError):
        tme.save_pretrained(make_model(), path)
    assert len(moved) == 1
    with pytest.raises(MultiExitError):
        tme.create_model(f'local-dir:{path}', pretrained=True)


def test_folder_gives_the_same_outputs_back(folder):
    model, path = folder
    loaded = tme.create_model(f'local-dir:{path}', pretrained=True).eval()
    assert loaded.exits.specs == model.exits.specs
    assert len(loaded.exits) == 3
    assert equal_outputs(model, loaded, torch.randn(2, 3, 64, 64))


def test_plain_timm_loads_the_main_network(folder):
    model, path = folder
    plain = timm.create_model(f'local-dir:{path}', pretrained=True).eval()
    images = torch.randn(2, 3, 64, 64)
    assert plain.state_dict().keys() == model.backbone.state_dict().keys()
    assert torch.equal(plain(images), model(images))


def test_files_hold_backbone_and_exits_apart(folder):
    model, path = folder
    assert safetensors.torch.load_file(path / 'model.safetensors').keys() == model.backbone.state_dict().keys()
    assert all(key.startswith('exits.') for key in safetensors.torch.load_file(path / 'exits.safetensors'))
    assert {file.name for file in path.iterdir()} == {'config.json', 'model.safetensors', 'exits.safetensors'}


def test_saving_again_keeps_other_files_and_leaves_no_temporary_ones(folder):
    _, path = folder
    (path / 'notes.txt').write_text('mine')
    other = make_model()
    tme.save_pretrained(other, path)
    assert (path / 'notes.txt').read_text() == 'mine'
    assert equal_outputs(
        other, tme.create_model(f'local-dir:{path}', pretrained=True).eval(), torch.randn(1, 3, 64, 64)
    )
    assert [file.name for file in path.parent.iterdir()] == ['net']


def test_failed_save_leaves_the_folder_as_it_was(folder, monkeypatch):
    model, path = folder

    def fail(*args, **kwargs):
        raise OSError('No space left on device')

    monkeypatch.setattr(safetensors.torch, 'save_file', fail)
    with pytest.raises(OSError, match='No space'):
        tme.save_pretrained(make_model(), path)
    monkeypatch.undo()
    assert equal_outputs(
        model, tme.create_model(f'local-dir:{path}', pretrained=True).eval(), torch.randn(1, 3, 64, 64)
    )
    assert [file.name for file in path.parent.iterdir()] == ['net']


def test_without_pretrained_the_folder_gives_its_architecture(folder):
    model, path = folder
    fresh = tme.create_model(f'local-dir:{path}')
    assert fresh.state_dict().keys() == model.state_dict().keys()
    assert not torch.equal(fresh.backbone.conv1[0].weight, model.backbone.conv1[0].weight)


def test_other_class_count_keeps_all_but_the_classifiers(folder):
    model, path = folder
    other = tme.create_model(f'local-dir:{path}', pretrained=True, num_classes=7).eval()
    state, own = model.state_dict(), other.state_dict()
    assert other(torch.randn(1, 3, 64, 64), exits=True).logits[0].shape == (1, 7)
    differing = {key for key in state if state[key].shape != own[key].shape or not torch.equal(state[key], own[key])}
    linear = {
        f'{prefix}.{kind}'
        for prefix in ('backbone.fc', *(f'exits.{k}.fc' for k in range(3)))
        for kind in ('weight', 'bias')
    }
    assert differing == linear


def test_named_exits_replace_the_folders_own(folder):
    model, path = folder
    other = tme.create_model(f'local-dir:{path}', pretrained=True, exits=[1], head='linear')
    assert [spec.head for spec in other.exits.specs] == ['linear']
    assert torch.equal(other.backbone.conv1[0].weight, model.backbone.conv1[0].weight)


def test_number_of_classes_is_at_the_root_alone_and_older_folders_load_as_before(folder):
    model, path = folder
    config = json.loads((path / 'config.json').read_text())
    assert config['num_classes'] == 5
    assert 'num_classes' not in config['model_args']  # transformers would pass it twice
    images = torch.randn(2, 3, 64, 64)
    for change in (lambda config: None, lambda config: config['model_args'].update(num_classes=5)):
        edit_config(path, change)
        assert equal_outputs(model, tme.create_model(f'local-dir:{path}', pretrained=True).eval(), images)
        assert torch.equal(timm.create_model(f'local-dir:{path}', pretrained=True).eval()(images), model(images))
        assert tme.create_model(f'local-dir:{path}', pretrained=True, num_classes=7)(images).shape == (2, 7)


def test_data_config_is_written_for_plain_timm(tmp_path):
    config = {'input_size': (3, 64, 64), 'mean': (0.1, 0.2, 0.3), 'std': (0.5, 0.5, 0.5), 'crop_pct': 1.0}
    tme.save_pretrained(make_model(), tmp_path, data_config=config)
    resolved = timm.data.resolve_data_config(model=timm.create_model(f'local-dir:{tmp_path}'))
    assert {key: tuple(v) if isinstance(v := resolved[key], list) else v for key in config} == config


def test_plain_model_is_saved_without_exits(tmp_path):
    tme.save_pretrained(timm.create_model('test_resnet', num_classes=5), tmp_path)
    assert read_model_config(tmp_path).exits is None
    with pytest.raises(tme.MultiExitError, match='plain timm model'):
        load_pretrained(tmp_path)


def edit_config(path, change):
    config = json.loads((path / 'config.json').read_text())
    change(config)
    (path / 'config.json').write_text(json.dumps(config))


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda config: config['multiexit'].update(format_version=2), 'format 2, this version reads 1'),
        (lambda config: config['multiexit'].pop('exits'), 'must list up to 64 exits'),
        (lambda config: config['multiexit']['exits'][0].pop('channels'), 'must be an object with the keys'),
        (
            lambda config: config['multiexit']['exits'][0].update(widths=3),
            'The widths of an exit must be a list of integers, got 3',
        ),
        (
            lambda config: config['multiexit']['exits'][0].update(channels=-1),
            r'must be an integer in \[1, 65536\], got -1',
        ),
        (
            lambda config: config['multiexit']['exits'][0].update(head='os.system'),
            "head must be one of .* got 'os.system'",
        ),
        (lambda config: config['multiexit']['exits'][0].update(module='nowhere'), 'no module to tap'),
        (lambda config: config['multiexit']['exits'].pop(), 'does not fit this model'),
        (lambda config: config['multiexit']['exits'][0].update(channels=16), 'do not fit test_resnet'),
    ],
    ids=['version', 'no-exits', 'no-channels', 'widths', 'channels', 'head', 'module', 'fewer', 'shape'],
)
def test_wrong_config_is_one_clear_line(folder, change, message):
    _, path = folder
    edit_config(path, change)
    with pytest.raises(tme.MultiExitError, match=message) as error:
        tme.create_model(f'local-dir:{path}', pretrained=True)
    assert '\n' not in str(error.value)


def test_missing_and_broken_files_are_named(folder, tmp_path):
    _, path = folder
    (path / 'exits.safetensors').write_bytes(b'no tensors')
    with pytest.raises(tme.MultiExitError, match='exits.safetensors cannot be read'):
        tme.create_model(f'local-dir:{path}', pretrained=True)
    (path / 'config.json').write_text('{')
    with pytest.raises(tme.MultiExitError, match='config.json cannot be read'):
        tme.create_model(f'local-dir:{path}', pretrained=True)
    with pytest.raises(tme.MultiExitError, match='not a model folder'):
        tme.create_model(f'local-dir:{tmp_path}', pretrained=True)


def test_training_checkpoint_goes_into_model_or_backbone(tmp_path):
    model, other = make_model(), make_model()
    torch.save({'state_dict': model.state_dict(), 'args': Namespace(model='test_resnet')}, tmp_path / 'full.pth.tar')
    tme.load_checkpoint(other, tmp_path / 'full.pth.tar')
    assert equal_outputs(model, other, torch.randn(1, 3, 64, 64))

    plain = timm.create_model('test_resnet', num_classes=5)
    torch.save(plain.state_dict(), tmp_path / 'plain.pth')
    head = other.exits[0].fc.weight.clone()
    tme.load_checkpoint(other, tmp_path / 'plain.pth')
    assert torch.equal(other.backbone.fc.weight, plain.fc.weight)
    assert torch.equal(other.exits[0].fc.weight, head)


def test_averaged_weights_are_taken_if_asked_for(tmp_path):
    model, average = make_model(), make_model()
    torch.save({'state_dict': model.state_dict(), 'state_dict_ema': average.state_dict()}, tmp_path / 'a.pth.tar')
    loaded = make_model()
    tme.load_checkpoint(loaded, tmp_path / 'a.pth.tar', use_ema=True)
    assert torch.equal(loaded.backbone.fc.weight, average.backbone.fc.weight)
    tme.load_checkpoint(loaded, tmp_path / 'a.pth.tar', use_ema=False)
    assert torch.equal(loaded.backbone.fc.weight, model.backbone.fc.weight)


def test_misfit_checkpoint_is_named_and_changes_nothing(tmp_path):
    model = make_model()
    torch.save({'state_dict': make_model(exits=[1]).state_dict()}, tmp_path / 'fewer.pth.tar')
    other = tme.create_model('test_resnet', num_classes=9)
    torch.save({'state_dict': other.state_dict()}, tmp_path / 'classes.pth.tar')
    (tmp_path / 'broken.pth.tar').write_bytes(b'not a checkpoint')
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for name, message in [
        ('fewer', 'weights are missing'),
        ('classes', r'is \[9, 96\] there and \[5, 96\] here|is \[9\] there and \[5\] here'),
        ('broken', 'Cannot read checkpoint'),
        ('absent', 'does not exist'),
    ]:
        with pytest.raises(tme.MultiExitError, match=message) as error:
            tme.load_checkpoint(model, tmp_path / f'{name}.pth.tar')
        assert '\n' not in str(error.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_exits_are_restored_from_a_training_checkpoint(tmp_path):
    model = make_model(exits=[2], head='paper')
    state = {'exits': [spec.to_dict() for spec in model.exits.specs]}
    torch.save({'state_dict': model.state_dict(), 'task_state': state, 'epoch': 3}, tmp_path / 'last.pth.tar')
    checkpoint = read_training_checkpoint(tmp_path / 'last.pth.tar')
    restored = restore_exits(timm.create_model('test_resnet', num_classes=5), checkpoint)
    assert checkpoint['epoch'] == 3
    assert restored.exits.specs == model.exits.specs


def test_policy_and_budgets_travel_with_the_folder(folder):
    model, path = folder
    images = torch.randn(40, 3, 64, 64)
    target = model(images).argmax(-1)
    model.calibrate([(images, target)], budget='95%')
    assert model.policy.used
    tme.save_pretrained(model, path)
    loaded = tme.create_model(f'local-dir:{path}', pretrained=True).eval()
    assert (loaded.policy, loaded.budgets) == (model.policy, model.budgets)
    for arguments in ({}, {'budget': '90%'}):
        first, second = model.infer(images, **arguments), loaded.infer(images, **arguments)
        assert torch.equal(first.exit_idx, second.exit_idx)
        assert torch.equal(first.logits, second.logits)
    assert timm.create_model(f'local-dir:{path}', pretrained=True) is not None
    # Fresh classifiers make a policy worthless.
    for fresh in (
        tme.create_model(f'local-dir:{path}', pretrained=True, num_classes=7),
        tme.create_model(f'local-dir:{path}', pretrained=False),
    ):
        assert (fresh.policy, fresh.budgets) == (None, None)


@pytest.mark.parametrize(
    ('key', 'value', 'message'),
    [
        ('policy', {'criterion': 'confidence', 'thresholds': [0.5]}, 'each of the 3 exits of the model, got 1'),
        ('policy', {'criterion': 'luck', 'thresholds': [0.5] * 3}, "criterion must be .* got 'luck'"),
        ('policy', {'criterion': ['confidence'], 'thresholds': [0.5] * 3}, 'criterion must be one of'),
        ('policy', {'criterion': 'confidence', 'thresholds': [10**400] * 3}, 'A threshold .* got 1000'),
        ('policy', 'confidence', 'A policy must be an object'),
        ('budgets', [], 'A table of budgets'),
    ],
)
def test_policy_in_a_config_that_fits_nothing_is_an_error(folder, key, value, message):
    _, path = folder
    config = json.loads((path / 'config.json').read_text())
    config['multiexit'][key] = value
    (path / 'config.json').write_text(json.dumps(config))
    with pytest.raises(tme.MultiExitError, match=message):
        tme.create_model(f'local-dir:{path}', pretrained=True)


def make_budgets(policy, macs=100.0):
    num_exits = len(policy.thresholds)
    point = PolicyResult(policy, 50.0, (0.0,) * num_exits + (1.0,), macs=macs)
    return BudgetTable((point,), total_macs=macs, max_macs=2 * macs)


def read_files(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_saved_policy_changes_nothing_but_itself(folder):
    _, path = folder
    edit_config(path, lambda config: config.update(mine={'text': 'é', 'number': 0.1 + 0.2, 'none': None, 'big': 2**70}))
    edit_config(path, lambda config: config['multiexit'].update(later=[1.5, True]))
    before, files = json.loads((path / 'config.json').read_text()), read_files(path)
    policy = ExitPolicy('confidence', (0.9, None, 1 / 3), temperatures=(1.5, 2.0, 0.7, 1.1), combine='mean')
    for one, table in ((ExitPolicy('margin', (0.1, 0.2, 0.3)), None), (policy, make_budgets(policy))):
        save_policy(path, one, table)
        after = json.loads((path / 'config.json').read_text())
        added = {name: after['multiexit'].pop(name) for name in ('policy', 'budgets') if name in after['multiexit']}
        assert json.dumps(after) == json.dumps(before)  # the order of the keys too
        assert set(added) == ({'policy', 'budgets'} if table else {'policy'})
    now = read_files(path)
    assert {name for name in now if now[name] != files.get(name)} == {'config.json'}
    assert set(now) == set(files)
    loaded = tme.create_model(f'local-dir:{path}', pretrained=True)
    assert (loaded.policy, loaded.budgets) == (policy, make_budgets(policy))


def test_no_policy_takes_the_old_one_away(folder):
    _, path = folder
    before = json.loads((path / 'config.json').read_text())
    policy = ExitPolicy('confidence', (0.9, 0.8, 0.7))
    save_policy(path, policy, make_budgets(policy))
    save_policy(path, None, None)
    assert json.loads((path / 'config.json').read_text()) == before


def test_policy_is_saved_beside_what_only_the_caller_may_set(folder):
    _, path = folder
    edit_config(path, lambda config: config.update(model_args={'norm_layer': 'mine', 'num_classes': 5}))
    save_policy(path, ExitPolicy('confidence', (0.9, 0.8, 0.7)), None)
    assert json.loads((path / 'config.json').read_text())['multiexit']['policy']['thresholds'] == [0.9, 0.8, 0.7]


@pytest.mark.parametrize(
    ('change', 'thresholds', 'in_table', 'message'),
    [
        (lambda config: None, (0.9,), False, 'each of the 3 exits of the model, got 1'),
        (lambda config: None, (0.9,) * 4, True, 'each of the 3 exits of the model, got 4'),
        (lambda config: config.pop('multiexit'), (0.9,) * 3, False, 'a model without exits: no policy'),
        (lambda config: config['multiexit'].update(format_version=2), (0.9,) * 3, False, 'this version reads 1'),
        (lambda config: config.update(model_args=[1]), (0.9,) * 3, False, 'model_args must be an object'),
        (lambda config: config.update(number=float('nan')), (0.9,) * 3, False, 'NaN is not a finite number'),
    ],
    ids=['policy', 'budgets', 'plain', 'newer', 'model_args', 'nan'],
)
def test_policy_that_cannot_be_saved_changes_nothing(folder, change, thresholds, in_table, message):
    _, path = folder
    edit_config(path, change)
    before = read_files(path)
    policy = ExitPolicy('confidence', thresholds)
    with pytest.raises(tme.MultiExitError, match=message) as error:
        save_policy(path, None if in_table else policy, make_budgets(policy) if in_table else None)
    assert '\n' not in str(error.value)
    assert read_files(path) == before


def test_full_disk_leaves_the_old_policy(folder, monkeypatch):
    _, path = folder
    save_policy(path, ExitPolicy('confidence', (0.9, 0.8, 0.7)), None)
    before = read_files(path)

    def write_half(self, text, **kwargs):
        self.write_bytes(text.encode()[:99])
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('pathlib.Path.write_text', write_half)
    with pytest.raises(
        tme.MultiExitError, match=r'config.json could not be written: No space left on device\. The previous'
    ):
        save_policy(path, ExitPolicy('confidence', (0.1, 0.1, 0.1)), None)
    assert read_files(path) == before


def test_hashes_are_of_the_weights_that_are_there(folder):
    _, path = folder
    (path / 'notes.txt').write_text('mine')
    (path / 'model.safetensors').write_bytes(b'x' * (2**20 + 1))  # more than is read at a time
    expected = {
        name: hashlib.sha256((path / name).read_bytes()).hexdigest()
        for name in ('model.safetensors', 'exits.safetensors')
    }
    assert hash_weights(path) == expected
    (path / 'exits.safetensors').unlink()
    assert hash_weights(path) == {'model.safetensors': expected['model.safetensors']}


@pytest.mark.parametrize('name', ['bad.pth', 'bad.safetensors'])
def test_checkpoint_path_that_is_no_checkpoint_is_one_line(name, tmp_path):
    (tmp_path / name).write_bytes(b'weights are not in here')
    with pytest.raises(
        InvalidValueError, match=f'^Cannot create test_resnet: .* Check checkpoint_path .*{name}'
    ) as caught:
        tme.create_model('test_resnet', checkpoint_path=str(tmp_path / name))
    assert '\n' not in str(caught.value)


def test_checkpoint_path_that_is_not_there_is_named(folder):
    _, path = folder
    for name in ('test_resnet', f'local-dir:{path}'):
        with pytest.raises(MissingFileError, match=r'^checkpoint_path /nowhere\.pth does not exist\.$'):
            tme.create_model(name, checkpoint_path='/nowhere.pth')


def test_cifar_network_is_made_in_the_dtype_that_is_asked(tmp_path):
    tme.save_pretrained(tme.create_model('cifar_resnet8', num_classes=10), tmp_path / 'net')
    model = tme.create_model(f'local-dir:{tmp_path}/net', pretrained=True, dtype=torch.bfloat16)
    assert {param.dtype for param in model.parameters()} == {torch.bfloat16}
