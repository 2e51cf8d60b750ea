"""Copies and conversions of a model, and its changes: frozen, with fewer exits, with projectors."""

import copy
import pickle
import re

import pytest
import timm
import timm.optim
import torch
from helpers import enliven
from helpers.members import DEIT, MEMBERS, QUICK, assert_close, assert_same_answers, modules
from timm.layers import convert_sync_batchnorm
from timm.models.convmixer import ConvMixer
from timm.utils import freeze
from torch import nn

import timm_multiexit as tme
from timm_multiexit.models.attach import attach_exits
from timm_multiexit.utils.errors import MultiExitError


@pytest.fixture
def x():
    return torch.randn(2, 3, 64, 64)


# Copies and conversions


@pytest.mark.parametrize(
    'duplicate',
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=['deepcopy', 'pickle'],
)
@pytest.mark.parametrize('name', ['test_vit', 'test_mambaout', DEIT])
def test_duplicate_answers_to_itself_and_survives_changes_of_the_original(make_small, name, duplicate):
    model = make_small(name).eval()
    images = torch.randn(2, 3, MEMBERS[name].size, MEMBERS[name].size)
    model(images, exits=True)
    double = duplicate(model)
    with torch.no_grad():
        before = model(images, exits=True)
        assert_same_answers(double, model, images)
        for param in model.parameters():
            param.mul_(1.1)
        after, doubled = model(images, exits=True), double(images, exits=True)
    for old, new, same in zip(before.logits, after.logits, doubled.logits):
        assert torch.equal(same, old)
        assert not torch.allclose(new, old, atol=1e-3)


@pytest.mark.parametrize('name', QUICK)
def test_channels_last_gives_the_same_answers(make_small, name):
    model = make_small(name).eval()
    images = torch.randn(2, 3, MEMBERS[name].size, MEMBERS[name].size)
    with torch.no_grad():
        expected = model(images, exits=True)
        model.to(memory_format=torch.channels_last)
        converted = [param for param in model.parameters() if param.ndim == 4 and min(param.shape[1:]) > 1]
        assert converted
        assert all(param.is_contiguous(memory_format=torch.channels_last) for param in converted)
        actual = model(images.to(memory_format=torch.channels_last), exits=True)
        assert_close(actual.logits, expected.logits)
        assert_close(actual.features, expected.features)
        assert_close(model(images.to(memory_format=torch.channels_last), exit_idx=0), expected.logits[0])


def test_taps_on_norms_go_on_working_after_sync_batch_norm_conversion():
    plain = enliven(ConvMixer(32, 8, patch_size=4, num_classes=10)).eval()
    model = attach_exits(plain, input_size=(3, 32, 32))
    images = torch.randn(2, 3, 32, 32)
    assert modules(model) == ['blocks.1.3', 'blocks.3.3', 'blocks.5.3']
    assert {type(plain.get_submodule(name)) for name in modules(model)} == {nn.BatchNorm2d}
    with torch.no_grad():
        expected = model(images, exits=True)
        model = convert_sync_batchnorm(model)
        assert {type(plain.get_submodule(name)) for name in modules(model)} == {nn.SyncBatchNorm}
        actual = model(images, exits=True)
        assert_close(actual.logits, expected.logits)
        assert_close(actual.features, expected.features)
        for idx in range(4):
            assert_close(model(images, exit_idx=idx), expected.logits[idx])


def test_stage_that_timm_froze_gets_no_gradients_and_keeps_its_statistics(make_small, x):
    model = make_small('test_resnet')
    expected = copy.deepcopy(model).eval()(x, exits=True)
    freeze(model, ['backbone.layer1'])
    assert_close(model.eval()(x, exits=True).logits, expected.logits)
    before = copy.deepcopy(model.state_dict())
    outputs = model.train()(x, exits=True)
    sum(logits.square().mean() for logits in outputs.logits).backward()
    # What timm leaves in the place of a frozen norm has no parameters.
    graded = {key: param.grad is not None for key, param in model.named_parameters()}
    assert graded == {key: not key.startswith('backbone.layer1.') for key in graded}
    assert any(key.startswith('backbone.layer1.') for key in graded)
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved
    assert not [key for key in moved if key.startswith('backbone.layer1.')]
    assert {key.split('.')[1] for key in moved if key.startswith('backbone.')} >= {'layer2', 'layer3', 'layer4'}


@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'kwargs'),
    [('test_vit', {'depth': 3}), ('test_mambaout', {'depths': (1, 1, 1, 1)})],
    ids=['test_vit', 'test_mambaout'],
)
def test_three_forms_compile_whole_at_three_batch_sizes_for_tokens_and_channels_last_maps(make_small, name, kwargs):
    model = make_small(name, **kwargs).eval()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    size = MEMBERS[name].size
    checked = 0
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64):
        for batch in (2, 3, 5):
            images = torch.randn(batch, 3, size, size)
            for form in ({}, {'exits': True}, {'exit_idx': 1}):
                assert_close(compiled(images, **form), model(images, **form))
                checked += 1
    assert checked == 9
    torch.compiler.reset()


# Frozen backbone


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit'])
def test_frozen_backbone_lets_the_heads_alone_learn_and_is_let_go_again(make_small, x, name):
    model = make_small(name).train()
    modes = {key: module.training for key, module in model.named_modules()}
    model.freeze_backbone()
    assert {key.split('.')[0] for key, param in model.named_parameters() if param.requires_grad} == {'exits'}
    assert all(param.requires_grad for param in model.exits.parameters())
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        assert not any(module.training for module in model.backbone.modules())
        assert model.training
        assert all(module.training for module in model.exits.modules())
        sum(logits.square().mean() for logits in model(x, exits=True).logits).backward()
        model.eval()
        model.train()
    assert all((param.grad is not None) == key.startswith('exits.') for key, param in model.named_parameters())
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved
    assert {key.split('.')[0] for key in moved} == {'exits'}
    model.freeze_backbone(False)
    assert all(param.requires_grad for param in model.parameters())
    assert {key: module.training for key, module in model.named_modules()} == modes
    model(x, exits=True)
    statistics = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert any(key.startswith('backbone.') for key in statistics) == (name == 'test_resnet')


def test_frozen_backbone_is_frozen_in_a_copy_too(make_small, x):
    model = make_small('test_resnet').train()
    model.freeze_backbone()
    double = copy.deepcopy(model).train()
    assert not any(module.training for module in double.backbone.modules())
    assert not any(param.requires_grad for param in double.backbone.parameters())


def test_unfreezing_leaves_an_eval_model_in_eval_mode(make_small):
    model = make_small('test_resnet').eval()
    model.freeze_backbone()
    model.freeze_backbone(False)
    assert not any(module.training for module in model.modules())


def test_layer_that_was_frozen_before_stays_frozen_when_the_backbone_is_let_go(make_small):
    model = make_small('test_resnet')
    model.backbone.layer1.requires_grad_(False)
    before = {key: param.requires_grad for key, param in model.named_parameters()}
    assert set(before.values()) == {True, False}
    model.freeze_backbone()
    model.freeze_backbone(False)
    assert {key: param.requires_grad for key, param in model.named_parameters()} == before


# Dropping exits


@pytest.mark.parametrize(
    ('dropped', 'kept'),
    [([0], [1, 2]), ([-1], [0, 1]), ([2, 0], [1]), ([0, -3], [1, 2]), ([], [0, 1, 2]), ([0, 1, 2], [])],
    ids=repr,
)
def test_dropped_exits_are_gone_and_the_others_answer_as_before(make_small, x, dropped, kept):
    # Maps and tokens in turn.
    model = make_small('test_vit' if len(kept) == 2 else 'test_resnet').eval()
    before, state, specs = model(x, exits=True), copy.deepcopy(model.state_dict()), model.exits.specs
    model.drop_exits(dropped)
    after = model(x, exits=True)
    assert model.exits.specs == tuple(specs[idx] for idx in kept)
    assert len(model.exits) == len(kept)
    for new, old in enumerate([*kept, 3]):
        assert torch.equal(after.logits[new], before.logits[old])
        assert torch.equal(after.features[new], before.features[old])
        assert_close(model(x, exit_idx=new), before.logits[old])
    assert len(after.logits) == len(kept) + 1 == len(model.cost())
    expected = {key: value for key, value in state.items() if key.startswith('backbone.')}
    for new, old in enumerate(kept):
        prefix = f'exits.{old}.'
        expected |= {
            f'exits.{new}.{key.removeprefix(prefix)}': value for key, value in state.items() if key.startswith(prefix)
        }
    assert model.state_dict().keys() == expected.keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key])
    for idx, spec in enumerate(specs):
        assert len(model.backbone.get_submodule(spec.module)._forward_hooks) == (idx in kept)
    assert len(model.get_classifier()._forward_pre_hooks) == 1


@pytest.mark.parametrize('train', [False, True], ids=['eval', 'train'])
def test_dropping_an_exit_keeps_the_mode(make_small, train):
    model = make_small('test_resnet').train(train)
    model.drop_exits([0])
    assert {module.training for module in model.modules()} == {train}


def test_model_survives_the_disk_after_an_exit_was_dropped(make_small, x, tmp_path):
    model = make_small('test_resnet').eval()
    model.drop_exits([0])
    tme.save_pretrained(model, tmp_path / 'net')
    loaded = tme.create_model(f'local-dir:{tmp_path / "net"}', pretrained=True).eval()
    assert loaded.exits.specs == model.exits.specs
    assert len(loaded.exits) == 2
    assert_same_answers(loaded, model, x)


@pytest.mark.parametrize('exits', [[3], [-4], [0, 7]], ids=repr)
def test_dropping_an_exit_that_is_not_there_is_an_error_that_changes_nothing(make_small, x, exits):
    model = make_small('test_resnet').eval()
    before = copy.deepcopy(model)
    with pytest.raises(MultiExitError, match=rf'exits must be .* in \[-3, 2\], got {re.escape(str(exits))}') as error:
        model.drop_exits(exits)
    assert '\n' not in str(error.value)
    assert len(model.exits) == 3
    assert_same_answers(model, before, x)


def test_exits_can_be_sliced_as_a_list_of_modules_can(make_small):
    model = make_small('test_resnet')
    heads = [model.exits[idx] for idx in range(3)]
    assert list(model.exits[1:]) == heads[1:]
    assert list(model.exits[:2]) == heads[:2]


# Projectors


@pytest.fixture
def projected(make_small):
    """A model with projectors, in training mode, and a copy from before it got them."""
    model = make_small('test_mambaout')
    before = copy.deepcopy(model)
    model.add_projectors()
    return model, before


def test_features_have_mains_width_in_training_and_their_own_in_eval(projected):
    model, before = projected
    images = torch.randn(2, 3, 96, 96)
    raw = [features.shape[1] for features in before(images, exits=True).features]
    assert raw == [128, 192, 256, 256], 'narrower, narrower and as wide'
    assert [head.projector is None for head in model.exits] == [False, False, True]
    model.train()
    with torch.no_grad():
        outputs, unprojected = model(images, exits=True), before.train()(images, exits=True)
    assert [features.shape[1] for features in outputs.features] == [256] * 4
    for idx in range(2):
        assert_close(outputs.features[idx], model.exits[idx].projector(unprojected.features[idx]))
    for actual, expected in zip(outputs.logits, unprojected.logits, strict=True):
        assert torch.equal(actual, expected)
    model.load_state_dict(before.state_dict(), strict=False)  # statistics have moved
    assert_same_answers(model.eval(), before.eval(), images)
    assert model.feature_widths() == (256,) * 4
    assert before.feature_widths() == tuple(raw)


def test_projectors_are_added_once(projected):
    model, _ = projected
    projectors = [head.projector for head in model.exits]
    model.add_projectors()
    assert all(head.projector is old for head, old in zip(model.exits, projectors, strict=True))


def test_features_are_distilled_through_projectors(projected):
    model, before = projected
    images, targets = torch.randn(2, 3, 96, 96), torch.tensor([1, 7])
    with pytest.raises(MultiExitError):
        tme.MultiExitTask(before, tme.create_loss('byot'))
    task = tme.MultiExitTask(model.train(), tme.create_loss('byot'))
    result = task(images, targets)
    assert result['feature_distance'].shape == (4,)
    assert (result['feature_distance'][:3] > 0).all()
    outputs = model(images, exits=True)
    teacher = outputs.features[-1].detach()
    expected = [(outputs.features[idx] - teacher).square().mean() for idx in range(3)]
    assert_close(result['feature_distance'][:3], torch.stack(expected).detach())
    result['loss'].backward()
    for head in list(model.exits)[:2]:
        assert all(param.grad.any() for param in head.projector.parameters())
    optimizer = timm.optim.create_optimizer_v2(model, 'sgd', lr=1e-2)
    weight = model.exits[0].projector.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.exits[0].projector.weight, weight)


def test_folder_holds_no_projectors_and_loads(projected, tmp_path):
    model, _ = projected
    tme.save_pretrained(model, tmp_path / 'net')
    loaded = tme.create_model(f'local-dir:{tmp_path / "net"}', pretrained=True).eval()
    own = {key for key in model.state_dict() if '.projector.' in key}
    assert len(own) == 4
    assert loaded.state_dict().keys() == model.state_dict().keys() - own
    assert_same_answers(loaded, model.eval(), torch.randn(2, 3, 96, 96))


def test_projectors_do_not_need_a_classifier(make_small):
    model = make_small('test_mambaout', num_classes=0)
    model.add_projectors()
    outputs = model.train()(torch.randn(2, 3, 96, 96), exits=True)
    assert [features.shape[1] for features in outputs.features] == [256] * 4


def test_copies_have_learnt_no_times(make_model):
    """Another thread may be adding them, and a copy may be on another device."""
    model = make_model().eval()
    x = torch.randn(1, 3, 64, 64)
    model.predict(x, deadline_ms=1e6)
    assert model._time_book.find(x) is not None
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin._time_book.find(x) is None
        assert twin.predict(x, deadline_ms=1e6).exit_idx.tolist() == [3]
