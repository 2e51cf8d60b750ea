"""Thousands of wrong configurations: each gives the model of the weights or one line of refusal, and takes no memory."""

import json
import logging
import shutil
from collections import Counter
from copy import deepcopy
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
from helpers.untrusted import CONTROL, LONG, MIB, check_refusal, is_faithful, limited_memory, load, write_good_folder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import timm_multiexit as tme

WORDS = [
    *('test_resnet', 'test_vit', 'vit_giant_patch14_dinov2', 'avg', 'max', '', 'bicubic', 'confidence', 'patience'),
    *(
        'entropy',
        'mean',
        'geometric',
        'conv',
        'linear',
        'paper',
        'bottleneck',
        'NCHW',
        'NHWC',
        'NLC',
        'layer1',
        'layer4.0',
        'fc',
    ),
    *(
        'conv1.0',
        '../x',
        '/etc/hostname',
        'exits.safetensors',
        'model.safetensors',
        '__class__',
        CONTROL,
        LONG[:20_000],
    ),
]
KEYS = [
    *(
        'num_classes',
        'in_chans',
        'img_size',
        'global_pool',
        'drop_rate',
        'output_stride',
        'patch_size',
        'block',
        'layers',
    ),
    *(
        'features_only',
        'pretrained_strict',
        'pretrained_cfg',
        'model_args',
        'multiexit',
        'device',
        'dtype',
        'scriptable',
    ),
    *(
        'architecture',
        'url',
        'file',
        'state_dict',
        'hf_hub_id',
        'hf_hub_filename',
        'custom_load',
        'source',
        'label_offset',
    ),
    *(
        'input_size',
        'first_conv',
        'classifier',
        'label_names',
        'exits',
        'policy',
        'budgets',
        'thresholds',
        'combine',
        'new',
    ),
    *(
        'widths',
        'channels',
        'layout',
        'num_prefix_tokens',
        'output',
        'temperatures',
        'points',
        '',
        '__class__',
        CONTROL,
    ),
]
NUMBERS = [
    *(-1, 0, 1, 2, 3, 9, 10, 11, 16, 32, 64, 1000, 16_384, 65_536, 100_000, 10**6, 10**9, 2**31, 2**63, 10**400),
    *(0.0, -0.0, 0.5, 1.0, 1.5, 1e-9, 1e18, 1e308, float('nan'), float('inf'), -float('inf')),
]
scalars = st.one_of(
    st.sampled_from(NUMBERS),
    st.sampled_from(WORDS),
    st.sampled_from([None, True, False]),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
)
values = st.one_of(
    scalars,
    st.lists(scalars, max_size=5),
    st.dictionaries(st.one_of(st.sampled_from(KEYS), st.text(max_size=4)), scalars, max_size=4),
    st.builds(lambda value, count: [value] * count, scalars, st.sampled_from([3, 4, 10, 70, 2000])),
    st.builds(
        nest := lambda value, depth: [nest(value, depth - 1)] if depth else value, scalars, st.sampled_from([1, 5, 500])
    ),
)
snippets = st.one_of(
    st.sampled_from(
        [b'{', b'}', b'[', b']', b',', b':', b'"', b'\\', b'\0', b'\xff', b'NaN', b'1' * 5000, b'-', b'e999']
    ),
    st.sampled_from(
        [b'[' * 10_000, b'{"a":' * 10_000, b'\\ud800', b'\xef\xbb\xbf', b'//', b'null', b'true', b'0', b' ']
    ),
    st.binary(max_size=3),
)
# What a user asks of the folder beside.
WAYS = st.sampled_from([{}, {}, {}, {'exits': [1]}, {'num_classes': 7}, {'in_chans': 1}, {'pretrained': False}])


def containers(value):
    """Return all lists and objects in a value, itself first."""
    if not isinstance(value, (list, dict)):
        return []
    inner = value.values() if isinstance(value, dict) else value
    return [value, *(container for item in inner for container in containers(item))]


def mutate(draw, config):
    """Replace, delete, duplicate or insert one value somewhere in a configuration, all depths being as likely."""
    places = containers(config)
    place = draw(st.sampled_from(places))
    keys = list(place) if isinstance(place, dict) else list(range(len(place)))
    action = draw(st.sampled_from(['replace', 'replace', 'delete', 'duplicate', 'insert']))
    if action == 'insert' or not keys:
        if isinstance(place, dict):
            place[draw(st.sampled_from(KEYS))] = draw(values)
        else:
            place.insert(draw(st.integers(0, len(place))), draw(values))
        return
    key = draw(st.sampled_from(keys))
    if action == 'replace':
        place[key] = draw(values)
    elif action == 'delete':
        del place[key]
    elif isinstance(place, dict):
        place[draw(st.sampled_from(KEYS))] = deepcopy(place[key])
    else:
        place[:] = place[: key + 1] * draw(st.sampled_from([2, 30])) + place[key:]


def garble(draw, text):
    """Cut a span out of a text, double it, or put other bytes in its place."""
    start = draw(st.integers(0, len(text)))
    end = min(len(text), start + draw(st.sampled_from([0, 1, 2, 10, 100, 2000])))
    middle = draw(st.one_of(st.just(b''), st.just(text[start:end] * 2), snippets))
    return text[:start] + middle + text[end:]


@st.composite
def configs(draw, good):
    """Return the bytes of a configuration a few steps away from a good one."""
    config = deepcopy(good)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        mutate(draw, config)
    text = json.dumps(config).encode()
    for _ in range(draw(st.sampled_from([0, 0, 0, 0, 1, 2]))):
        text = garble(draw, text)
    return text


def changed_bytes(good):
    """Return a strategy of (changes of single bytes, most of them in the header, bytes that are cut off)."""
    header = 8 + int.from_bytes(good[:8], 'little')
    places = st.one_of(st.integers(0, header - 1), st.integers(0, len(good) - 1))
    changes = st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=4)
    return st.tuples(changes, st.sampled_from([0, 0, 0, 1, 8, 4000]))


def change_bytes(good, drawn):
    changes, cut = drawn
    content = bytearray(good)
    for place, value in changes:
        content[place] = value
    return bytes(content[: len(content) - cut])


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return write_good_folder(tmp_path_factory.mktemp('fuzz') / 'good')


@pytest.fixture
def attack(folder, tmp_path):
    """Return a function that writes what is made of many draws to a file of the folder and counts what comes of it."""

    def run(name, strategy, count, make=lambda content: content):
        target = Path(shutil.copytree(folder, tmp_path / 'net'))
        outcomes = Counter()

        @settings(
            max_examples=count,
            deadline=timedelta(seconds=5),
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy, WAYS)
        def check(drawn, kwargs):
            (target / name).write_bytes(make(drawn))  # not drawn whole: hypothesis keeps what it has drawn
            with limited_memory(100 * MIB):  # of each load: hypothesis reads whole modules in search of constants
                result = outcome(target, kwargs)
            outcomes[result] += 1

        logging.disable(logging.WARNING)  # pytest keeps all that is logged
        try:
            check()
        finally:
            logging.disable(logging.NOTSET)
        return outcomes

    return run


def outcome(folder, kwargs):
    """Return whether a folder was refused or loaded; anything else is an error."""
    try:
        model = load(folder, **kwargs)
    except tme.MultiExitError as error:
        check_refusal(error)
        return 'refused'
    assert isinstance(model, tme.MultiExitModel)
    assert all(param.device.type == 'cpu' for param in model.parameters())
    if not kwargs:
        assert is_faithful(model, folder, with_exits=has_section(folder))
    return 'loaded'


def has_section(folder):
    return json.loads((folder / 'config.json').read_bytes()).get('multiexit') is not None


@pytest.mark.parametrize(
    ('count', 'least'),
    [(50, 1), pytest.param(1500, 60, marks=pytest.mark.slow)],
    ids=['50', '1500'],
)
def test_any_config_is_refused_or_gives_the_model_of_the_weights(folder, attack, count, least):
    good = json.loads((folder / 'config.json').read_text())
    outcomes = attack('config.json', configs(good), count)
    assert outcomes.total() >= count
    assert min(outcomes['refused'], outcomes['loaded']) >= least


@pytest.mark.parametrize('count', [40, pytest.param(400, marks=pytest.mark.slow)])
def test_any_bytes_of_weights_are_refused_or_loaded_as_they_are(folder, attack, count):
    good = (folder / 'exits.safetensors').read_bytes()
    outcomes = attack('exits.safetensors', changed_bytes(good), count, partial(change_bytes, good))
    assert outcomes['refused'] >= count // 10
    assert outcomes['loaded'] >= count // 10


def test_fuzz_starts_from_a_config_that_loads(folder):
    assert outcome(folder, {}) == 'loaded'
    assert len(safetensors.torch.load_file(folder / 'exits.safetensors')) > 20
