"""Folders that want to do harm: each is refused in one line, by `create_model`, whatever it is asked for.

The Hub's repositories run through the same loader.
"""

import json
import os
import pickle
import re
import shutil
import signal
import socket
import struct
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from helpers.untrusted import CONTROL, LONG, check_refusal, is_faithful, limited_memory, load, write_good_folder

import timm_multiexit as tme

WAYS = {'own exits': {}, 'named exits': {'exits': [1]}, 'other classes': {'num_classes': 7}}


@pytest.fixture(scope='module')
def good(tmp_path_factory):
    return write_good_folder(tmp_path_factory.mktemp('hostile') / 'good')


@pytest.fixture
def folder(good, tmp_path):
    return Path(shutil.copytree(good, tmp_path / 'net'))


@pytest.fixture(autouse=True)
def forbidden(monkeypatch):
    """A test fails where anything is unpickled or the network is asked, even if the error was caught."""
    calls = []

    def forbid(name):
        def call(*args, **kwargs):
            calls.append(name)
            raise OSError(f'{name} is forbidden here.')

        return call

    for place, name in (
        (torch, 'load'),
        (pickle, 'load'),
        (pickle, 'loads'),
        (pickle, 'Unpickler'),
        (socket.socket, 'connect'),
    ):
        monkeypatch.setattr(place, name, forbid(name))
    yield
    assert calls == []


class Hanging(BaseException):
    """Raised when a test takes too long; no `except Exception` takes it for a fault of the file."""


@pytest.fixture(autouse=True)
def alarm():
    def stop(*args):
        raise Hanging

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 15)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, previous)


def refuse(folder, word='', **kwargs):
    """Return why `create_model` refuses a folder, with a word in it that says what was wrong."""
    with limited_memory(), pytest.raises(tme.MultiExitError) as caught:
        load(folder, **kwargs)
    check_refusal(caught.value)
    assert word in str(caught.value).replace(str(folder), '')
    return str(caught.value)


def edit(folder, path, value):
    """Set or (value is `GONE`) delete what is at a path of keys in config.json."""
    file = folder / 'config.json'
    config = inner = json.loads(file.read_text())
    for key in path[:-1]:
        inner = inner[key]
    if value is GONE:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    file.write_text(json.dumps(config))


GONE = ...  # not a value of JSON
NAN, INFINITY = float('nan'), float('inf')

# Path of keys in config.json, what stands there, a word of the refusal. Refused with and without weights.
ARCHITECTURE = [
    (('architecture',), value, word)
    for value, word in [
        (GONE, 'None'),
        (None, 'None'),
        (7, '7'),
        (['test_resnet'], 'test_resnet'),
        ({}, ''),
        ('', ''),
        ('no_such_model', 'no_such_model'),
        ('features_only', 'features_only'),
        ('timm.models.resnet', 'timm.models.resnet'),
        ('test_resnet/../../x', 'test_resnet/'),
        ('hf-hub:timm/resnet18', 'hf-hub'),
        ('local-dir:/etc', '/etc'),
        ('/etc/hostname', 'hostname'),
        ('__class__', '__class__'),
        ('test_resnet\n', ''),
        (CONTROL, 'two'),
        (LONG, 'xxx'),
    ]
]
MODEL_ARGS = [
    (('model_args', key), value, key)
    for key, value in [
        ('pretrained_strict', False),
        ('features_only', True),
        ('pretrained_cfg', {'file': '/etc/hostname'}),
        ('pretrained_cfg_overlay', {'file': '/etc/hostname'}),
        ('pretrained', True),
        ('checkpoint_path', '/etc/hostname'),
        ('cache_dir', '/tmp/elsewhere'),
        ('pretrained_filter_fn', 'os.system'),
        ('kwargs_filter', []),
        ('feature_cfg', {}),
        ('device', 'cuda'),
        ('dtype', 'float16'),
        ('scriptable', True),
        ('odd_arg', 1),
        ('self', 1),
        ('model_name', 'test_vit'),
        ('__class__', 'x'),
        ('block', 'Bottleneck'),
        ('layers', [1, 1, 1, 40]),
        ('layers', [10**6] * 4),
        ('channels', [10**6] * 4),
        ('depth', 10**6),
        ('embed_dim', 10**6),
        *(('num_classes', value) for value in (10**9, 100_001, -1, True, 1.5, '10', [10], 10**400)),
        *(('in_chans', value) for value in (10**9, 10**6, 0, -3, True, 3.0, '3')),
        *(('img_size', value) for value in (10**9, [10**5] * 2, 0, [64], [64] * 1000, '64', True, [64, None])),
        *(('global_pool', value) for value in (7, ['avg'], LONG)),
        *(('drop_rate', value) for value in (7, -0.1, True, '0.1', [0.1], 10**400)),
        ('drop_path_rate', 7),
    ]
]
MODEL_ARGS += [(('model_args', 'global_pool'), value, value) for value in ('no_such_pool', '__class__')]
CONFIG = [
    (('model_args',), [], 'model_args'),
    (('model_args',), 'x', 'model_args'),
    (('model_args', ''), 1, ''),
    (('model_args', CONTROL), 1, 'two'),
    (('model_args', LONG), 1, 'xxx'),
    *((('num_classes',), value, 'num_classes') for value in (10**9, -1, True, 1.5, '10', [10], 10**400)),
    *((('label_names',), value, 'label_names') for value in ('abc', 7, [1] * 10, [['a']] * 10, ['a'] * 3, ['a'] * 11)),
    (('label_names',), [LONG] * 10, 'label_names'),
    (('label_descriptions',), [7], 'label_descriptions'),
    (('label_descriptions',), {'class 0': {}}, 'label_descriptions'),
]
PRETRAINED_CFG = [
    (('pretrained_cfg',), [], 'pretrained_cfg'),
    (('pretrained_cfg',), 'x', 'pretrained_cfg'),
    *(
        (('pretrained_cfg', key), value, key)
        for key, value in [
            ('url', 'http://localhost:9/x.pth'),
            ('file', '/etc/hostname'),
            ('state_dict', {'conv1.0.weight': 0}),
            ('hf_hub_id', 'evil/repo'),
            ('hf_hub_filename', 'pytorch_model.bin'),
            ('hf_hub_filename', '../exits.safetensors'),
            ('source', 'url'),
            ('custom_load', 'hf'),
            ('custom_load', 1),
            *(
                ('input_size', value)
                for value in (7, [64, 64], [3, 64, -64], [3, 10**9, 64], [3, '64', 64], [True] * 3)
            ),
            *(('input_size', value) for value in ([3, 64.5, 64], [3] * 1000, {'0': 3})),
            ('test_input_size', [3, 0, 0]),
            *(('mean', value) for value in ('x', ['a'] * 3, [10**400] * 3, [], [0] * 9999)),
            *(('std', value) for value in ([0, 0, 0], [-1] * 3, [True] * 3, {}, 7)),
            *(('crop_pct', value) for value in (0, -1, '0.9', True, [1], 1e9)),
            *(('interpolation', value) for value in (7, ['bicubic'], {}, LONG, '__class__()')),
            *(('crop_mode', value) for value in (7, [], LONG)),
            ('num_classes', 10**9),
            ('num_classes', 'ten'),
            ('first_conv', 7),
            ('first_conv', '../x'),
            ('classifier', {'a': 1}),
            ('classifier', LONG),
            ('pool_size', [10**9] * 2),
            ('fixed_input_size', 'yes'),
            ('label_offset', 10**9),
        ]
    ),
]
EXITS = [
    (('multiexit',), 7, 'format'),
    (('multiexit',), [], 'format'),
    *((('multiexit', 'origin'), value, 'origin') for value in (7, [], 'a', {'base': 7}, {'license': [LONG]})),
    *((('multiexit', 'format_version'), value, 'format') for value in (2, '1', True, GONE, None, -1, 0, 1.5, LONG)),
    *(
        (('multiexit', 'weights'), value, 'weights')
        for value in ('', '.', '..', '../x.safetensors', '/etc/hostname', 'model.safetensors', 'pytorch_model.bin')
    ),
    *((('multiexit', 'weights'), value, 'weights') for value in (7, ['exits.safetensors'], LONG, CONTROL)),
    *((('multiexit', 'exits'), value, 'exit') for value in (GONE, None, 7, 'auto', {}, {'0': {}}, [[]], [7], [])),
    *(
        (('multiexit', 'exits', 0, key), value, word)
        for key, word, values in [
            ('head', 'head', ('os.system', 'ExitHead', '__class__', '', 7, [], LONG, CONTROL)),
            ('module', 'module', ('', '.', '..', 'nowhere', 'layer1..0', '.layer1', 'layer1.', 'layer1.99', '../x')),
            ('module', 'module', ('__class__', 'layer1.__class__', 'forward', 7, None, ['layer1'], LONG, CONTROL)),
            ('channels', 'channel', (10**9, 65537, 0, -1, True, 32.0, '32', None, [32], 10**400)),
            ('reduction', 'reduction', (10**9, 0, -1, True, 4.0, '4')),
            ('widths', 'width', (24, '24', None, [10**9], [65537] * 4, [True], [24.0], ['24'], [[24]], [-1])),
            ('widths', 'width', ([24] * 10_000, {}, [], [16] * 65)),
            ('layout', 'layout', ('CHWN', '', 7, [], {}, None, LONG, CONTROL)),
            ('num_prefix_tokens', 'prefix', (10**9, -1, True, 1.5)),
            ('output', 'output', (10**9, -1, True, '0')),
        ]
        for value in values
    ),
]
ROWS = [*ARCHITECTURE, *MODEL_ARGS, *CONFIG, *PRETRAINED_CFG, *EXITS]


def name_of(row):
    path, value, _ = row
    text = ascii(value)
    return f'{".".join(ascii(key)[:20] for key in path)}={text[:30]}'.replace("'", '')


@pytest.mark.parametrize(('path', 'value', 'word'), ROWS, ids=map(name_of, ROWS))
def test_config_that_asks_for_what_a_file_must_not_is_refused(folder, path, value, word):
    edit(folder, path, value)
    refuse(folder, word)
    refuse(folder, word, pretrained=False)


@pytest.mark.parametrize(
    ('path', 'value', 'word'),
    rows := [*ARCHITECTURE[::3], *MODEL_ARGS[:12], *PRETRAINED_CFG[2:12]],
    ids=map(name_of, rows),
)
def test_backbone_is_checked_whoever_names_the_exits(folder, path, value, word):
    edit(folder, path, value)
    for kwargs in WAYS.values():
        refuse(folder, word, **kwargs)
    edit(folder, ('multiexit',), GONE)
    for kwargs in WAYS.values():
        refuse(folder, word, **kwargs)


@pytest.mark.parametrize('value', [NAN, INFINITY, -INFINITY])
@pytest.mark.parametrize(
    'path',
    [('model_args', 'drop_rate'), ('model_args', 'num_classes'), ('pretrained_cfg', 'crop_pct')]
    + [('pretrained_cfg', key, 0) for key in ('mean', 'std', 'input_size')]
    + [('multiexit', 'exits', 0, key) for key in ('channels', 'reduction')],
    ids=lambda path: '.'.join(map(str, path)),
)
def test_numbers_that_are_none_are_refused(folder, path, value):
    edit(folder, path, value)
    refuse(folder)
    refuse(folder, pretrained=False)


WRONG_POLICY = [
    (
        'thresholds',
        [[], [0.5], [0.5] * 4, [0.5] * 10**5, 0.5, {'0': 0.5}, ['0.5'] * 3, [True] * 3, [[0.5]] * 3]
        + [[value, None, None] for value in (NAN, INFINITY, -INFINITY, 1.5, -0.1, 10**400)],
    ),
    ('temperatures', [[0.5], [0] * 4, [NAN] * 4, [INFINITY] * 4, [10**400] * 4, [1.0] * 10**5, 'x', [None] * 4]),
    ('criterion', ['luck', '__class__', 7, ['confidence'], {}, None, LONG, CONTROL]),
    ('combine', ['sum', 7, ['mean'], {}, LONG, CONTROL]),
]
WRONG_SIZES = [NAN, INFINITY, -1, 10**400, 'x', True, []]
POLICIES = [
    (('policy',), [7, [], 'confidence', {}, {'criterion': 'confidence'}]),
    *((('policy', key), values) for key, values in WRONG_POLICY),
    *((('budgets', 'points', 0, 'policy', key), values) for key, values in WRONG_POLICY),
    (('budgets',), [7, [], 'x', {}, {'points': []}]),
    (('budgets', 'points'), [[], 7, [7], [None] * 10**5, {}]),
    *((('budgets', key), [*WRONG_SIZES, 1e300]) for key in ('total_macs', 'max_macs')),
    *((('budgets', 'points', 0, key), [*WRONG_SIZES, [1.0] * 10**5]) for key in ('accuracy', 'shares', 'macs')),
]


@pytest.mark.parametrize(
    ('path', 'value'),
    rows := [(path, value) for path, values in POLICIES for value in values],
    ids=[name_of((*row, '')) for row in rows],
)
def test_policy_and_budgets_that_make_no_sense_are_refused(folder, path, value):
    edit(folder, ('multiexit', *path), value)
    refuse(folder)


def spec(**changes):
    known = {'module': 'layer2.0', 'channels': 48, 'reduction': 8, 'head': 'linear', 'widths': []}
    return {**known, **changes}


@pytest.mark.parametrize(
    'exits',
    [
        [spec()] * 65,
        [spec()] * 5000,
        [spec(), spec()],
        [spec(module='layer3.0', channels=192, reduction=16), spec()],
    ],
    ids=['65', '5000', 'twice', 'deep first'],
)
def test_exits_are_few_and_from_shallow_to_deep(folder, exits):
    edit(folder, ('multiexit', 'exits'), exits)
    for key in ('policy', 'budgets'):
        edit(folder, ('multiexit', key), GONE)
    write_heads(folder, exits[:65])
    refuse(folder, 'exit')
    refuse(folder, 'exit', pretrained=False)


def write_heads(folder, exits):
    """Write the weights of 'linear' heads of ten classes, so that nothing is missing."""
    tensors = {}
    for idx, values in enumerate(exits):
        sizes = [('convs', values['channels'], ()), ('fc', 10, (values['channels'],))]
        for name, size, rest in sizes:
            tensors[f'exits.{idx}.{name}.weight'] = torch.ones(size, *rest)
            tensors[f'exits.{idx}.{name}.bias'] = torch.zeros(size)
    safetensors.torch.save_file(tensors, folder / 'exits.safetensors', metadata={'format': 'pt'})


def test_heads_written_by_hand_load(folder):
    edit(folder, ('multiexit', 'exits'), [spec()])
    for key in ('policy', 'budgets'):
        edit(folder, ('multiexit', key), GONE)
    write_heads(folder, [spec()])
    assert load(folder).exits[0].fc.weight.eq(1).all()


@pytest.mark.parametrize(
    'changes',
    [
        {'channels': 16},
        {'channels': 16_384},
        {'layout': 'NHWC'},
        {'layout': 'NLC'},
    ],
    ids=str,
)
def test_exits_that_do_not_describe_the_backbone_are_refused_though_their_weights_agree(folder, changes):
    edit(folder, ('multiexit', 'exits'), [spec(**changes)])
    for key in ('policy', 'budgets'):
        edit(folder, ('multiexit', key), GONE)
    write_heads(folder, [spec(**changes)])
    refuse(folder, 'exit')


@pytest.mark.parametrize(
    ('path', 'value'),
    [
        (('architecture',), 'vit_giant_patch14_dinov2'),  # 4.5 GB
        (('architecture',), 'test_vit'),
        (('model_args', 'num_classes'), 100_000),
        (('model_args', 'in_chans'), 1),
        (('multiexit', 'exits'), [spec(head='conv', channels=16_384, widths=[16_384] * 3)] * 3),  # 13 GB
        (('multiexit', 'exits', 1, 'widths'), [16_384, 16_384, 96]),
        (('multiexit', 'exits', 1, 'head'), 'linear'),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_config_is_compared_with_the_weights_before_memory_is_taken(folder, path, value):
    edit(folder, path, value)
    refuse(folder)


def test_fresh_heads_of_a_file_take_little_memory(folder):
    edit(folder, ('multiexit', 'exits'), [spec(head='conv', widths=[16_384] * 3)])  # 2 GB
    for key in ('policy', 'budgets'):
        edit(folder, ('multiexit', key), GONE)
    refuse(folder, pretrained=False)


@pytest.mark.parametrize(
    'numbers',
    [
        {('num_classes',): 9},
        {('num_classes',): 0},
        {('num_classes',): GONE},
        {('num_classes',): GONE, ('pretrained_cfg', 'num_classes'): 9},
        {('num_classes',): GONE, ('pretrained_cfg', 'num_classes'): GONE},
        {('pretrained_cfg', 'num_classes'): 9},
        {('model_args', 'num_classes'): 9},
        {('num_classes',): GONE, ('model_args', 'num_classes'): 10},
        {('num_classes',): 9, ('pretrained_cfg', 'classifier'): ['fc', 'conv1.0']},
        {('pretrained_cfg', 'label_offset'): 1},
        {('pretrained_cfg', 'input_size'): [1, 64, 64], ('pretrained_cfg', 'first_conv'): 'layer2.0.conv1.conv'},
    ],
    ids=lambda numbers: ascii(list(numbers.items()))[:60],
)
@pytest.mark.parametrize('way', ['own exits', 'named exits'])
def test_no_layer_is_left_untrained_in_silence(folder, numbers, way):
    for path, value in numbers.items():
        edit(folder, path, value)
    try:
        model = load(folder, **WAYS[way])
    except tme.MultiExitError as error:
        check_refusal(error)
    else:
        assert is_faithful(model, folder, with_exits=way == 'own exits')


@pytest.mark.parametrize(
    ('key', 'value', 'kwargs', 'fresh'),
    [
        ('classifier', 'conv1.0', {'num_classes': 7}, ['fc']),
        ('classifier', ['fc', 'conv1.0'], {'num_classes': 7}, ['fc']),
        ('classifier', None, {'num_classes': 7}, ['fc']),
        ('first_conv', ['conv1.0', 'layer2.0.conv1.conv'], {'in_chans': 1}, ['conv1.0']),
        ('first_conv', 'layer2.0.conv1.conv', {'in_chans': 1}, ['conv1.0']),
    ],
    ids=str,
)
def test_what_is_fresh_is_for_the_architecture_to_say(folder, key, value, kwargs, fresh):
    edit(folder, ('pretrained_cfg', key), value)
    for exits in ({}, {'exits': [1]}):
        try:
            model = load(folder, **kwargs, **exits)
        except tme.MultiExitError as error:
            check_refusal(error)
        else:
            assert is_faithful(model, folder, with_exits=not exits, fresh=fresh)


@pytest.mark.parametrize(
    'text',
    {
        'empty': b'',
        'list': b'[]',
        'null': b'null',
        'number': b'7',
        'text': b'"architecture"',
        'half': b'{"architecture": "test_resnet", ',
        'two': b'{} {}',
        'deep list': b'{"architecture": "test_resnet", "a": ' + b'[' * 100_000 + b']' * 100_000 + b'}',
        'deep object': b'{"a": ' * 100_000 + b'1' + b'}' * 100_000,
        'deep and open': b'[' * 100_000,
        'digits': b'{"architecture": "test_resnet", "num_classes": ' + b'1' * 5000 + b'}',
        'latin-1': '{"architecture": "test_resnet", "label_names": ["\u00e9"]}'.encode('latin-1'),
        'utf-16': '{"architecture": "test_resnet"}'.encode('utf-16'),
        'twice, late': b'{' + b''.join(b'"%d":0,' % idx for idx in range(200_000)) + b'"a":0,"a":0}',
        'BOM': '{"architecture": "test_resnet"}'.encode('utf-8-sig'),
        'zeros': bytes(1000),
        '9 MB': b'{"architecture": "test_resnet", "a": "' + b'x' * (9 << 20) + b'"}',
        '9 MB of blanks': b' ' * (9 << 20) + b'{}',
    }.items(),
    ids=lambda item: item[0],
)
def test_file_that_is_no_json_object_is_refused(folder, text):
    (folder / 'config.json').write_bytes(text[1])
    refuse(folder)
    refuse(folder, pretrained=False)


@pytest.mark.parametrize(
    ('old', 'new'),
    [
        ('{', '{"architecture": "test_vit", '),
        ('"format_version":', '"format_version": 1, "format_version":'),
        ('"tag":', '"tag": "a", "tag":'),
        ('{', '{"new": NaN, '),
        ('{', '{"new": [Infinity], '),
        ('{', '{"new": {"a": -Infinity}, '),
    ],
)
def test_json_that_parsers_read_differently_is_refused(folder, old, new):
    text = (folder / 'config.json').read_text()
    assert old in text
    (folder / 'config.json').write_text(text.replace(old, new, 1))
    refuse(folder)


@pytest.mark.parametrize('item', [b'[]', b'{}', b'0.1', b'""'])
def test_largest_file_takes_little_memory(folder, item):
    text = (folder / 'config.json').read_bytes()
    count = ((8 << 20) - len(text)) // (len(item) + 1) - 10
    (folder / 'config.json').write_bytes(text[:-1] + b',"new":[' + (item + b',') * count + b'0]}')
    with limited_memory():
        try:
            assert is_faithful(load(folder), folder)
        except tme.MultiExitError as error:
            check_refusal(error)


@pytest.mark.parametrize('place', ['thresholds', 'mean', 'crop_pct'])
def test_number_that_overflows_is_refused(folder, place):
    text = (folder / 'config.json').read_text()
    text, count = re.subn(rf'("{place}": \[?)[0-9.]+', r'\g<1>1e400', text, count=1)
    assert count == 1
    (folder / 'config.json').write_text(text)
    refuse(folder)


def test_config_that_is_no_file_is_refused(folder):
    config = folder / 'config.json'
    config.unlink()
    refuse(folder)
    config.mkdir()
    refuse(folder)
    config.rmdir()
    os.mkfifo(config)
    refuse(folder)
    config.unlink()
    with config.open('wb') as file:
        file.truncate(64 << 30)  # no block of it is on the disk
    refuse(folder)
    refuse(folder / 'nowhere')


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


PICKLES = ['pytorch_model.bin', 'pytorch_model.pth', 'model.pth', 'open_clip_pytorch_model.bin']


def write_pickles(folder, state):
    for name in PICKLES:
        torch.save(state, folder / name)


@pytest.mark.parametrize('is_plain', [False, True], ids=['with section', 'plain'])
@pytest.mark.parametrize('kind', ['payload', 'benign'])
def test_pickles_are_never_read(folder, is_plain, kind):
    state = Payload(folder / 'marker') if kind == 'payload' else dict(load(folder).backbone.state_dict())
    if is_plain:
        edit(folder, ('multiexit',), GONE)
    write_pickles(folder, state)
    assert is_faithful(load(folder), folder, with_exits=not is_plain)
    for missing in ('model.safetensors', 'exits.safetensors'):
        (folder / missing).unlink()
        for kwargs in WAYS.values():
            refuse(folder, 'model.safetensors', **kwargs)
    assert not (folder / 'marker').exists()


def test_pickle_under_the_name_of_safe_weights_is_refused(folder):
    for name in ('exits.safetensors', 'model.safetensors'):
        torch.save(Payload(folder / 'marker'), folder / name)
        refuse(folder, name)
    assert not (folder / 'marker').exists()


def test_no_other_file_stands_in_for_missing_weights(folder):
    shutil.copy(folder / 'model.safetensors', folder / 'a.safetensors')
    shutil.copy(folder / 'model.safetensors', folder / 'open_clip_model.safetensors')
    for name in ('model.safetensors', 'exits.safetensors'):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        refuse(folder, name)
        (folder / name).mkdir()
        refuse(folder, name)
        (folder / name).rmdir()
        (folder / name).write_bytes(content)
    assert load(folder)


def header_of(path):
    content = path.read_bytes()
    (length,) = struct.unpack('<Q', content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack('<Q', len(text)) + text + data


def lie(change):
    """Return a change of a weights file from a change of one entry of its header."""

    def apply(header, data):
        name = next(key for key in header if key.endswith('fc.weight'))
        change(header[name])
        return join(header, data)

    return apply


BROKEN = {
    'empty': lambda header, data: b'',
    'short': lambda header, data: b'\x01\x02',
    'header of 2**63 bytes': lambda header, data: struct.pack('<Q', 1 << 63) + data,
    'header of 10**8 bytes': lambda header, data: struct.pack('<Q', 10**8) + data,
    'header is a list': lambda header, data: join(b'[]', data),
    'header is deep': lambda header, data: join(b'[' * 100_000, data),
    'header is not UTF-8': lambda header, data: join(b'{"\xff\xfe": 1}', data),
    'truncated': lambda header, data: join(header, data[:-1]),
    'longer': lambda header, data: join(header, data + b'\0' * 8),
    'no data': lambda header, data: join(header, b''),
    'no tensors': lambda header, data: join({}, b''),
    'other shape': lie(lambda entry: entry.update(shape=entry['shape'][::-1])),
    'flat shape': lie(lambda entry: entry.update(shape=[entry['shape'][0] * entry['shape'][1]])),
    'huge shape': lie(lambda entry: entry.update(shape=[1 << 40, 1 << 40])),
    'negative shape': lie(lambda entry: entry.update(shape=[-1, -1])),
    'offsets outside': lie(lambda entry: entry.update(data_offsets=[0, 1 << 50])),
    'offsets backwards': lie(lambda entry: entry.update(data_offsets=entry['data_offsets'][::-1])),
    'unknown type': lie(lambda entry: entry.update(dtype='X99')),
    'integers': lie(lambda entry: entry.update(dtype='I32')),
    'unsigned': lie(lambda entry: entry.update(dtype='U32')),
}


@pytest.mark.parametrize('kind', BROKEN)
@pytest.mark.parametrize('name', ['model.safetensors', 'exits.safetensors'])
def test_weights_file_with_a_lying_header_is_refused(folder, name, kind):
    path = folder / name
    path.write_bytes(BROKEN[kind](*header_of(path)))
    refuse(folder, name)


@pytest.mark.parametrize('name', ['model.safetensors', 'exits.safetensors'])
def test_weights_file_with_a_huge_header_is_refused_in_little_memory(folder, name):
    entry = '"%06d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = '{' + ','.join(entry % idx for idx in range(400_000)) + '}'  # 23 MB; safetensors reads up to 100
    (folder / name).write_bytes(join(header.encode(), b''))
    refuse(folder, name)


def with_one(change):
    def apply(tensors):
        name = next(key for key in sorted(tensors) if key.endswith('fc.weight'))
        tensors[name] = change(tensors[name])

    return apply


def fill_one(value):
    return with_one(lambda tensor: tensor.index_fill(0, torch.tensor([3]), value))


WRONG_WEIGHTS = {
    'one missing': lambda tensors: tensors.popitem(),
    'one more': lambda tensors: tensors.update(more=torch.ones(2)),
    'one more, hostile name': lambda tensors: tensors.update({CONTROL.replace('\ud800', '') + LONG: torch.ones(2)}),
    'int8': with_one(lambda tensor: tensor.to(torch.int8)),
    'int64': with_one(lambda tensor: tensor.long()),
    'bool': with_one(lambda tensor: tensor.bool()),
    'complex': with_one(lambda tensor: tensor.double()),  # of as many bytes, see the test
    'a row more': with_one(lambda tensor: torch.cat([tensor, tensor[:1]])),
    'a dimension more': with_one(lambda tensor: tensor[None]),
    'scalar': with_one(lambda tensor: tensor.sum()),
    'empty': with_one(lambda tensor: tensor[:0]),
    'nan': fill_one(NAN),
    'infinity': fill_one(INFINITY),
}


@pytest.mark.parametrize('kind', WRONG_WEIGHTS)
@pytest.mark.parametrize('name', ['model.safetensors', 'exits.safetensors'])
def test_weights_that_do_not_fit_or_are_not_finite_are_refused(folder, name, kind):
    tensors = safetensors.torch.load_file(folder / name)
    WRONG_WEIGHTS[kind](tensors)
    safetensors.torch.save_file(tensors, folder / name, metadata={'format': 'pt'})
    if kind == 'complex':
        content = (folder / name).read_bytes()
        assert content.count(b'"F64"') == 1
        (folder / name).write_bytes(content.replace(b'"F64"', b'"C64"'))  # which old safetensors cannot write
    refuse(folder, name)


def test_statistics_that_are_not_finite_are_refused(folder):
    tensors = safetensors.torch.load_file(folder / 'model.safetensors')
    next(tensor for key, tensor in tensors.items() if key.endswith('running_mean')).fill_(NAN)
    safetensors.torch.save_file(tensors, folder / 'model.safetensors')
    refuse(folder, 'model.safetensors')


def test_swapped_weights_are_refused(folder):
    (folder / 'model.safetensors').rename(folder / 'x')
    (folder / 'exits.safetensors').rename(folder / 'model.safetensors')
    (folder / 'x').rename(folder / 'exits.safetensors')
    refuse(folder, '.safetensors')


def move_out(folder, name, target):
    """Move a file to another place and leave a link to it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    (folder / name).rename(target)
    (folder / name).symlink_to(os.path.relpath(target, folder))


FILES = ['config.json', 'model.safetensors', 'exits.safetensors']


@pytest.mark.parametrize('name', FILES)
@pytest.mark.parametrize('place', ['x', '../net2/x', '../../x'])
def test_links_that_leave_the_folder_are_refused(folder, name, place):
    move_out(folder, name, folder.parent / 'outside' / place)
    refuse(folder, name)
    (folder / name).unlink()
    (folder / name).symlink_to('/etc/hostname')
    refuse(folder, name)
    (folder / name).unlink()
    (folder / name).symlink_to(name)  # to itself
    refuse(folder, name)


COMMIT = '0123456789abcdef0123456789abcdef01234567'


@pytest.fixture
def snapshot(folder):
    """The folder as the Hub's cache has it: links from a snapshot to blobs."""
    repo = folder.parent / 'models--org--name'
    snapshot = Path(shutil.copytree(folder, repo / 'snapshots' / COMMIT))
    for idx, name in enumerate(FILES):
        move_out(snapshot, name, repo / 'blobs' / f'{idx:064x}')
    return snapshot


def test_links_of_the_hubs_cache_are_followed(snapshot):
    assert all((snapshot / name).is_symlink() for name in FILES)
    assert load(snapshot).policy is not None


@pytest.mark.parametrize('name', FILES)
@pytest.mark.parametrize('target', ['models--evil--name/blobs/x', 'models--org--name/x', 'models--org--name/refs/x'])
def test_links_of_the_hubs_cache_lead_to_its_own_blobs_alone(snapshot, name, target):
    content = (snapshot / name).read_bytes()
    other = snapshot.parents[2] / target
    other.parent.mkdir(parents=True, exist_ok=True)
    other.write_bytes(content)
    (snapshot / name).unlink()
    (snapshot / name).symlink_to(other)
    refuse(snapshot, name)


def test_links_within_the_folder_and_to_it_are_followed(folder):
    move_out(folder, 'exits.safetensors', folder / 'weights' / 'exits-1.safetensors')
    (folder.parent / 'link').symlink_to(folder)
    assert load(folder.parent / 'link').policy is not None


def test_callers_own_keyword_allows_what_a_file_must_not_set(folder):
    edit(folder, ('model_args', 'block_args'), {})
    refuse(folder, 'block_args')
    edit(folder, ('model_args', 'block_args'), GONE)
    edit(folder, ('model_args', 'replace_stem_pool'), True)
    refuse(folder, 'replace_stem_pool')
    assert is_faithful(load(folder, replace_stem_pool=False), folder)


@pytest.mark.parametrize('is_at_root', [False, True], ids=['now', 'long ago'])
def test_custom_load_of_older_files_is_of_no_effect(folder, is_at_root):
    """timm read weights beside such a file as its own, and so do we: `load_pretrained` of the model is not called."""
    saved = timm.create_model('test_vit', num_classes=10)
    tme.save_pretrained(saved, folder)
    edit(folder, ('pretrained_cfg', 'custom_load'), True)
    if is_at_root:
        fields = json.loads((folder / 'config.json').read_text())['pretrained_cfg']
        fields |= {'architecture': 'test_vit', 'num_classes': 10, 'fixed_input_size': True}
        (folder / 'config.json').write_text(json.dumps(fields))
    assert is_faithful(load(folder, exits=[1]), folder, with_exits=False)


def test_place_of_weights_is_refused_with_the_reason(folder):
    edit(folder, ('pretrained_cfg', 'url'), 'http://localhost:9/x.pth')
    line = refuse(folder)
    assert line.endswith(
        "url must be empty in a file, got 'http://localhost:9/x.pth': weights are those in model.safetensors beside it."
    )


@pytest.mark.parametrize('name', ['model.safetensors', 'exits.safetensors'])
def test_pointer_of_git_lfs_says_what_to_run(folder, name):
    pointer = f'version https://git-lfs.github.com/spec/v1\noid sha256:{"0" * 64}\nsize 123\n'
    (folder / name).write_text(pointer)
    line = refuse(folder, name)
    assert line.endswith(f'holds no weights: run `git lfs pull` in {folder}.')


def test_unknown_keys_without_power_are_ignored(folder):
    for path in (('new',), ('pretrained_cfg', 'new'), ('multiexit', 'new'), ('multiexit', 'exits', 0, 'new')):
        edit(folder, path, {'surprise': [1, LONG]})
    assert load(folder).policy is not None
    assert len(load(folder, pretrained=False).exits) == 3


@pytest.mark.parametrize(
    ('name', 'kwargs'),
    [
        ('test_vit', {'img_size': 96, 'num_classes': 5, 'drop_path_rate': 0.1}),
        ('test_resnet', {'in_chans': 1, 'global_pool': 'max', 'drop_rate': 0.2}),
        ('test_convnext', {'drop_path_rate': 0.1, 'num_classes': 0}),
    ],
    ids=['test_vit', 'test_resnet', 'test_convnext'],
)
@pytest.mark.parametrize('is_plain', [False, True], ids=['with exits', 'plain'])
def test_what_is_saved_with_usual_arguments_is_not_refused(tmp_path, name, kwargs, is_plain):
    saved = timm.create_model(name, **kwargs) if is_plain else tme.create_model(name, exits=[1], **kwargs)
    tme.save_pretrained(saved, tmp_path)
    assert is_faithful(load(tmp_path), tmp_path, with_exits=not is_plain)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_weights_of_half_precision_load(folder, dtype):
    tensors = safetensors.torch.load_file(folder / 'exits.safetensors')
    half = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}
    safetensors.torch.save_file(half, folder / 'exits.safetensors')
    assert torch.equal(load(folder).exits[0].fc.weight, half['exits.0.fc.weight'].float())
