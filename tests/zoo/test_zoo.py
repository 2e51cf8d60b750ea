"""Every registered timm model, as data-free copies, and one real member of every family. Marker `zoo`."""

import logging

import pytest
import timm
import torch
from helpers.families import ENCODERS, FAMILIES, NAMES
from helpers.zoo_sample import NUM_CHUNKS
from timm.models import get_model_input_config
from torch import nn

from timm_multiexit.models.attach import attach_exits
from timm_multiexit.utils.errors import MultiExitError

pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings('ignore')]


def make_backbone(name):
    backbone = timm.create_model(name)
    return backbone if backbone.num_classes else timm.create_model(name, num_classes=10)


def test_registry_is_the_one_that_was_counted():
    assert len(NAMES) == 1371
    assert set(ENCODERS) <= set(NAMES)
    assert len(NAMES) - len(ENCODERS) == 1364
    assert len(FAMILIES) == 93


@pytest.mark.parametrize('chunk', range(NUM_CHUNKS))
def test_every_name_attaches(chunk, caplog):
    """Names, exits and costs on the meta device: each exit costs at most what the backbone does."""
    caplog.set_level(logging.ERROR)
    wrong = {}
    names = NAMES[chunk::NUM_CHUNKS]
    for name in names:
        with torch.device('meta'):
            backbone = make_backbone(name)
        try:
            costs = attach_exits(backbone).cost()
        except MultiExitError as error:
            if name not in ENCODERS or 'has no classifier module' not in str(error):
                wrong[name] = str(error)
            continue
        if name in ENCODERS or not 1 <= len(costs) - 1 <= 6:
            wrong[name] = f'{len(costs) - 1} exits'
        heads = [cost.head.macs / costs[-1].fixed.macs for cost in costs[:-1]]
        if max(heads) > 0.1 or max(cost.fixed.macs for cost in costs[:-1]) >= costs[-1].fixed.macs:
            wrong[name] = f'heads {heads}, fixed {[cost.fixed.macs for cost in costs]}'
    assert len(names) in (len(NAMES) // NUM_CHUNKS, len(NAMES) // NUM_CHUNKS + 1)
    assert not wrong


@pytest.mark.parametrize('family', FAMILIES)
def test_family_member_answers_at_every_exit(family):
    backbone = make_backbone(FAMILIES[family]).eval()
    assert type(backbone).__name__ == family
    x = torch.randn(1, *get_model_input_config(backbone)['input_size'])
    with torch.no_grad():
        plain = backbone(x)
        model = attach_exits(backbone)
        assert torch.equal(model(x), plain)
        outputs = model(x, exits=True)
        assert torch.equal(outputs.logits[-1], plain)
        for idx in range(len(model.exits)):
            torch.testing.assert_close(model(x, exit_idx=idx), outputs.logits[idx], rtol=1e-4, atol=1e-5)
        assert torch.equal(model(x), plain)
    assert len(model.exits) >= 1
    assert all(logits.shape == plain.shape and logits.isfinite().all() for logits in outputs.logits)
    assert outputs.features[-1].ndim == 2


@pytest.mark.parametrize('family', FAMILIES)
@torch.no_grad()
def test_family_member_loses_its_classes_and_gets_others(family):
    with torch.device('meta'):
        backbone = make_backbone(FAMILIES[family]).eval()
        widths = [[features.shape[-1] for features in attach_exits(backbone)(images(backbone), exits=True).features]]
        model = attach_exits(backbone)
        for num_classes in (0, 7, 0):
            model.reset_classifier(num_classes)
            outputs = model(images(backbone), exits=True)
            assert model.num_classes == num_classes
            assert len(outputs.logits) == len(model.exits) + 1
            if num_classes:
                assert {tuple(logits.shape) for logits in outputs.logits} == {(1, num_classes)}
                widths.append([features.shape[-1] for features in outputs.features])
            else:
                assert [logits.shape for logits in outputs.logits[:-1]] == [
                    each.shape for each in outputs.features[:-1]
                ]
    assert widths[0] == widths[1]


def images(backbone):
    return torch.empty(1, *get_model_input_config(backbone)['input_size'], device='meta')


def first_weight(backbone):
    """Return the first weight of the stem: where every exit's gradient must arrive."""
    return next(module.weight for module in backbone.modules() if isinstance(module, (nn.Conv2d, nn.Linear)))


@pytest.mark.parametrize('family', FAMILIES)
def test_family_member_learns_from_every_exit_with_and_without_checkpointing(family):
    torch.manual_seed(0)
    backbone = make_backbone(FAMILIES[family])
    model = attach_exits(backbone).eval()  # norms and dropout at rest, so that two forwards can be compared
    size = get_model_input_config(backbone)['input_size']
    x = torch.randn(1, *size)
    stem = first_weight(backbone)
    gradients, logits = [], []
    for checkpointing in (False, True):
        if checkpointing:
            try:
                model.set_grad_checkpointing(True)
            except (AssertionError, AttributeError) as error:
                pytest.skip(f'{type(backbone).__name__} has no gradient checkpointing: {error}')
        outputs = model(x, exits=True)
        logits.append([tensor.detach() for tensor in outputs.logits])
        for idx, head in enumerate(model.exits):
            loss = outputs.logits[idx].square().sum()
            grads = torch.autograd.grad(loss, [stem, head.fc.weight], retain_graph=not checkpointing)
            assert all(grad.abs().sum() > 0 for grad in grads), f'exit {idx}'
            gradients.append(grads[0])
            if checkpointing:
                break  # a checkpointed graph is gone after one backward
    assert all(torch.equal(first, second) for first, second in zip(*logits))
    torch.testing.assert_close(gradients[-1], gradients[0], rtol=1e-3, atol=1e-5)
