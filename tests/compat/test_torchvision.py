"""torchvision's classifiers as backbones: everything that timm's can, for one small network of each family."""

import copy
import io
import pickle
from functools import partial
from typing import NamedTuple

import pytest
import safetensors.torch
import torch
import torchvision
from helpers import enliven
from helpers.members import assert_close, assert_same_answers, modules, record
from torch import nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.vgg import VGG, make_layers

import timm_multiexit as tme
from timm_multiexit.utils.errors import CheckpointError

CLASSES = 4


class Family(NamedTuple):
    """A small network of one family.

    Attributes:
        build: Makes it.
        exits: Names of modules.
        taps: What is tapped: (module, channels, reduction, layout, tokens in front), read off torchvision's source.
        classifier: The module that makes the logits.
        size: Height and width of the images.
        can_leave: Whether samples can leave the batch at the exits.
    """

    build: object
    exits: tuple
    taps: tuple
    classifier: str
    size: int = 64
    can_leave: tuple = (True, True)


def build_vgg():
    with torch.device('meta'):  # its three linear layers have 120 million parameters
        net = VGG(nn.Sequential(), num_classes=CLASSES)
    net.features = make_layers([16, 'M', 16, 'M', 32, 'M', 32, 'M'])
    net.classifier = nn.Sequential(nn.Linear(32 * 49, 24), nn.ReLU(), nn.Dropout(0.1), nn.Linear(24, CLASSES))
    return net


def build_convnext():
    stages = [CNBlockConfig(16, 32, 1), CNBlockConfig(32, 48, 1), CNBlockConfig(48, None, 1)]
    return ConvNeXt(stages, num_classes=CLASSES)


def build_swin(**kwargs):
    return torchvision.models.SwinTransformer([4, 4], 16, [1, 1, 1], [1, 2, 4], [4, 4], num_classes=CLASSES, **kwargs)


zoo = torchvision.models
FAMILIES = {
    'resnet': Family(
        partial(zoo.ResNet, zoo.resnet.BasicBlock, [1, 2, 1, 1], num_classes=CLASSES),
        ('layer1', 'layer2'),
        (('layer1.0', 64, 4, 'NCHW', 0), ('layer2.1', 128, 8, 'NCHW', 0)),
        'fc',
    ),
    'mobilenet': Family(
        partial(zoo.mobilenet_v3_small, num_classes=CLASSES, width_mult=0.5),
        ('features.1', 'features.3'),
        (('features.1', 8, 4, 'NCHW', 0), ('features.3', 16, 8, 'NCHW', 0)),
        'classifier.3',
    ),
    'efficientnet': Family(
        partial(zoo.efficientnet_b0, num_classes=CLASSES),
        ('features.2', 'features.3'),
        (('features.2.1', 24, 4, 'NCHW', 0), ('features.3.1', 40, 8, 'NCHW', 0)),
        'classifier.1',
    ),
    'densenet': Family(
        partial(zoo.DenseNet, 8, (2, 2, 2), 16, num_classes=CLASSES),
        ('features.transition1', 'features.transition2'),
        (('features.transition1.pool', 16, 8, 'NCHW', 0), ('features.transition2.pool', 16, 16, 'NCHW', 0)),
        'classifier',
    ),
    'vit': Family(
        partial(
            zoo.VisionTransformer,
            image_size=64, patch_size=16, num_layers=3, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=CLASSES,
        ),
        ('encoder.layers.encoder_layer_0', 'encoder.layers.encoder_layer_1'),
        (
            ('encoder.layers.encoder_layer_0', 32, 16, 'NLC', 1),
            ('encoder.layers.encoder_layer_1', 32, 16, 'NLC', 1),
        ),
        'heads.head',
    ),
    'swin': Family(
        build_swin,
        ('features.1', 'features.3'),
        (('features.1.0', 16, 4, 'NHWC', 0), ('features.3.0', 32, 8, 'NHWC', 0)),
        'head',
    ),
    'convnext': Family(
        build_convnext,
        ('features.1', 'features.3'),
        (('features.1.0', 16, 4, 'NCHW', 0), ('features.3.0', 32, 8, 'NCHW', 0)),
        'classifier.2',
    ),
    'regnet': Family(
        partial(zoo.regnet_y_400mf, num_classes=CLASSES),
        ('trunk_output.block1', 'trunk_output.block2'),
        (('trunk_output.block1.block1-0', 48, 4, 'NCHW', 0), ('trunk_output.block2.block2-2', 104, 8, 'NCHW', 0)),
        'fc',
    ),
    'shufflenet': Family(
        partial(zoo.shufflenet_v2_x0_5, num_classes=CLASSES),
        ('stage2', 'stage3'),
        (('stage2.3', 48, 8, 'NCHW', 0), ('stage3.7', 96, 16, 'NCHW', 0)),
        'fc',
    ),
    'vgg': Family(
        build_vgg,
        ('features.2', 'features.5'),
        (('features.2', 16, 2, 'NCHW', 0), ('features.5', 16, 4, 'NCHW', 0)),
        'classifier.3',
    ),
    'squeezenet': Family(
        partial(zoo.squeezenet1_1, num_classes=CLASSES),
        ('features.2', 'features.5'),
        (('features.2', 64, 4, 'NCHW', 0), ('features.5', 128, 9, 'NCHW', 0)),
        'classifier.1',
    ),
}  # fmt: skip


def build(name):
    torch.manual_seed(3)
    return enliven(FAMILIES[name].build()).eval()


def attach(name, backbone=None):
    family = FAMILIES[name]
    model = tme.attach_exits(backbone or build(name), list(family.exits), input_size=(3, family.size, family.size))
    enliven(model.exits)
    return model.eval()


def images(name, count=6):
    size = FAMILIES[name].size
    return torch.randn(count, 3, size, size) * torch.linspace(0.3, 3, count).view(-1, 1, 1, 1)


def check_places(name):
    model = attach(name)
    specs = model.exits.specs
    assert (
        tuple((s.module, s.channels, s.reduction, s.layout, s.num_prefix_tokens) for s in specs) == FAMILIES[name].taps
    )
    assert model.module_info.classifiers == (FAMILIES[name].classifier,)
    assert model.num_classes == CLASSES


def check_logits(name):
    """Heads get what plain hooks see at the modules that were named, and main is the plain network."""
    family, model, x = FAMILIES[name], attach(name), images(name)
    logits, left, entered = record(build(name), x, family.exits, [family.classifier])
    with torch.no_grad():
        outputs = model(x, exits=True)
        assert torch.equal(model(x), logits)
        for idx, (spec, place) in enumerate(zip(model.exits.specs, family.exits)):
            seen = left[place]
            if spec.layout == 'NHWC':
                seen = seen.permute(0, 3, 1, 2)
            elif spec.layout == 'NLC':
                seen = seen[:, 1:].transpose(1, 2).reshape(len(x), spec.channels, 4, 4)
            assert_close(outputs.logits[idx], model.exits[idx](seen)[0])
            assert_close(model(x, exit_idx=idx), outputs.logits[idx])
    features = entered[family.classifier]
    assert_close(outputs.features[-1], features if features.ndim == 2 else features.mean((2, 3)))
    assert_close(outputs.logits[-1], logits)
    assert not torch.allclose(outputs.logits[0], outputs.logits[1])


def check_inference(name):
    """Answers are those of the policy on all logits; the loop of `anytime` gives each of them; so does `predict`."""
    model, x = attach(name), images(name)
    with torch.no_grad():
        logits = model(x, exits=True).logits
    assert model.can_leave == FAMILIES[name].can_leave
    scores = logits[0].softmax(1).amax(1).sort().values
    policy = tme.ExitPolicy('confidence', (float(scores[2:4].mean()), 0.6))
    found, expected = model.infer(x, policy), tme.apply_policy(policy, logits)
    assert torch.equal(found.exit_idx, expected.exit_idx)
    assert len(found.exit_idx.unique()) > 1
    assert_close(found.logits, expected.logits)
    steps = list(model.anytime(x))
    assert [idx for idx, _ in steps] == [0, 1, 2]
    for idx, step in steps:
        assert_close(step, logits[idx])
    late = model.predict(x, deadline_ms=1e8)
    assert late.exit_idx.tolist() == [2] * len(x)
    assert_close(late.logits, logits[2])


def check_calibration(name):
    model = attach(name)
    loader = [(images(name), torch.arange(6) % CLASSES) for _ in range(4)]
    policy = model.calibrate(loader, budget='100%')
    assert model.policy is policy
    table = tme.evaluate(model, loader)
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in loader)
    assert table.rows[2]['top-1'] == pytest.approx(100 * right / 24)
    assert model.infer(images(name), budget='100%').logits.shape == (6, CLASSES)


def check_truncation(name):
    model, x = attach(name), images(name)
    for idx in range(3):
        network = tme.truncate(model, idx)
        assert sum(param.numel() for param in network.parameters()) == model.cost()[idx].fixed.params or idx == 2
        with torch.no_grad():
            assert torch.equal(network(x), model(x, exit_idx=idx))
        assert network.num_classes == CLASSES
    small = sum(param.numel() for param in tme.truncate(model, 0).parameters())
    assert small < sum(param.numel() for param in model.parameters())


def check_saving(name, folder):
    model, x = attach(name), images(name)
    model.policy = tme.ExitPolicy('confidence', (0.5, 0.7))
    tme.save_pretrained(model, folder, label_names=['a', 'b', 'c', 'd'])
    torch.manual_seed(11)
    fresh = FAMILIES[name].build().eval()
    assert not torch.equal(fresh(x), model(x))
    loaded = tme.load_exits(fresh, folder)
    assert loaded.backbone is fresh
    assert loaded.policy == model.policy
    assert loaded.exits.specs == model.exits.specs
    assert_same_answers(loaded, model, x)
    # The weights are under the module's own names.
    tensors = safetensors.torch.load_file(folder / 'model.safetensors')
    plain = FAMILIES[name].build().eval()
    plain.load_state_dict(tensors)
    assert torch.equal(plain(x), model(x))
    with pytest.raises(
        CheckpointError, match=r'build it, and call timm_multiexit.load_exits\(module, FOLDER\)'
    ) as error:
        tme.create_model(f'local-dir:{folder}', pretrained=True)
    assert '\n' not in str(error.value)


def check_copies(name):
    model, x = attach(name), images(name)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert_same_answers(other, model, x)


def check_training(name):
    """A step is that of the loss worked out on the logits of all classifiers, and it reaches every part."""
    model, x, y = attach(name).train(), images(name), torch.arange(6) % CLASSES
    for module in model.modules():  # what draws numbers, or averages over the batch, is held
        if not list(module.children()):
            module.eval()
    task = tme.MultiExitTask(model, tme.create_loss('ce'), verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    with torch.no_grad():
        logits = model(x, exits=True).logits
    result = task(x, y)
    expected = sum(nn.functional.cross_entropy(single, y) for single in logits)
    assert float(result['loss'].detach()) == pytest.approx(float(expected), rel=1e-4)
    result['loss'].backward()
    unused = [key for key, param in model.named_parameters() if param.grad is None]
    assert unused == []
    optimizer.step()
    assert float(task(x, y)['loss'].detach()) < float(expected)


def check_export(name):
    model, x = attach(name), images(name)
    with torch.no_grad():
        for kwargs in ({}, {'exits': True}, {'exit_idx': 0}):
            program = torch.export.export(model, (x,), kwargs).module()
            found, expected = program(x, **kwargs), model(x, **kwargs)
            pairs = zip(found.logits, expected.logits) if 'exits' in kwargs else [(found, expected)]
            for one, other in pairs:
                assert_close(one, other)


def check_dtype(name):
    backbone = build(name).to(torch.bfloat16)
    model, x = attach(name, backbone), images(name).to(torch.bfloat16)
    assert [param.dtype for param in model.exits.parameters()] == [torch.bfloat16] * len(list(model.exits.parameters()))
    assert model.cost() == attach(name).cost()
    assert model(x, exit_idx=0).dtype == torch.bfloat16
    assert modules(model) == modules(attach(name))


CHECKS = {
    'places': check_places,
    'logits': check_logits,
    'inference': check_inference,
    'calibration': check_calibration,
    'truncation': check_truncation,
    'saving': check_saving,
    'copies': check_copies,
    'training': check_training,
    'export': check_export,
    'bfloat16': check_dtype,
}


# All checks of two families, and the places in the others; the rest takes minutes.
QUICK = ('vit', 'densenet')
CASES = [
    pytest.param(
        name, check, marks=[pytest.mark.slow] * (check == 'export' or (name not in QUICK and check != 'places'))
    )
    for name in FAMILIES
    for check in CHECKS
]


@pytest.mark.parametrize(('name', 'check'), CASES)
def test_torchvisions_networks_can_what_timms_can(name, check, tmp_path):
    CHECKS[check](name, *([tmp_path / 'model'] if check == 'saving' else []))


def test_example_of_the_readme_attaches_at_resnet18():
    torch.manual_seed(0)
    backbone = torchvision.models.resnet18(num_classes=4)
    model = tme.attach_exits(backbone, ['layer1', 'layer2'], input_size=(3, 64, 64))
    assert modules(model) == ['layer1.1', 'layer2.1']
    # 1.82 GMACs at 224 px, as published, are 149 M at 64 px but for the classifier of 4 in place of 1000 classes.
    convolutions = (1_814_073_344 - 512_000) * 64**2 / 224**2
    assert model.cost()[-1].fixed.macs == pytest.approx(convolutions + 512 * 4, rel=1e-3)


def test_attention_is_counted_as_worked_out_by_hand():
    model = attach('vit')
    tokens, width, hidden = 17, 32, 64
    block = 3 * tokens * width**2 + 2 * tokens**2 * width + tokens * width**2 + 2 * tokens * width * hidden
    patches = 16 * 3 * 16**2 * width
    costs = model.cost()
    assert [cost.fixed.macs - cost.head.macs for cost in costs] == [
        patches + block, patches + 2 * block, patches + 3 * block + width * CLASSES,
    ]  # fmt: skip
