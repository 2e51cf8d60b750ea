"""The model card says what metrics.json says: its tables, its metadata and its snippets."""

import copy
import json
import re

import pytest
import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, parse_eval_result_entries
from torch.utils.data import DataLoader, TensorDataset

import timm_multiexit as tme
from timm_multiexit.publishing.card import REQUIRED, write_card, write_eval_results
from timm_multiexit.publishing.card_tables import headline
from timm_multiexit.utils.errors import MultiExitError, one_line
from timm_multiexit.utils.markdown import code, escape, fence, link, number

ENVIRONMENT = {
    'commit': '5ff385c',
    'versions': 'python 3.11.2, timm 1.0.31, torch 2.15.0',
    'hardware': '2 x Intel(R) Xeon(R) CPU @ 2.20GHz',
    'threads': '1 torch thread',
}


def make_row(name, tap, params, fixed, sequential, top1=None, top5=None, ece=None):
    row = {'exit': name, 'tap': tap, 'params': params, 'GMACs fixed': fixed, 'GMACs sequential': sequential}
    return row | ({} if top1 is None else {'top-1': top1, 'top-5': top5, 'ECE': ece})


METRICS = {
    'format_version': 1,
    'model_name': 'hf-hub:org/cifar10-resnet18',
    'architecture': 'resnet18',
    'num_classes': 10,
    'input_size': [3, 32, 32],
    'needs_import': False,
    'license': {'id': 'apache-2.0', 'name': None, 'link': None, 'note': 'That of the weights.'},
    'base_model': 'timm/resnet18.a1_in1k',
    'dataset': {'name': 'cifar10', 'hub_id': 'uoft-cs/cifar10', 'split': 'test', 'num_samples': 10000},
    'rows': [
        make_row('0', 'layer1', 157504, 0.0101234, 0.0101234, 70.1, 98.0, 2.3),
        make_row('1', 'layer2', 683072, 0.0191, 0.0201, 78.444, 99.126, 2.9),
        make_row('main', 'classifier', 11181642, 0.0371, 0.0392, 80.8, 99.2, 4.123),
        make_row('ens', '-', 11381642, None, 0.0392, 81.2, 99.25, 1.5),
    ],
    'epoch': {
        'best': 12,
        'epochs': 16,
        'chosen_by': 'top1',
        'chosen_on': '5000 images held out of train',
        'is_reported_split': False,
    },
    'dynamic': [
        {
            'policy': 'main',
            'top-1': 80.8,
            'macs': 37.1e6,
            'macs_percent': 100.0,
            'img/s': 900.0,
            'time_ratio': 1.0,
        },
        {
            'policy': 'all exits',
            'top-1': 80.8,
            'macs': 39.2e6,
            'macs_percent': 105.66,
            'img/s': 850.123,
            'time_ratio': 1.061,
        },
        {
            'policy': 'budget 40%',
            'chosen_on': '4000 images held out of train',
            'criterion': 'confidence',
            'thresholds': [0.93, None],
            'temperatures': [1.1, 1.0, 1.2],
            'combine': None,
            'top-1': 80.19,
            'shares': [0.4, 0.0, 0.6],
            'macs': 14.77e6,
            'macs_percent': 39.81,
            'img/s': 1935.4,
            'time_ratio': 0.465,
        },
        {
            'policy': 'budget 0.02GMACs',
            'chosen_on': '4000 images held out of train',
            'criterion': 'confidence',
            'thresholds': [0.9714, 0.8],
            'temperatures': [],
            'combine': 'mean',
            'top-1': 80.97,
            'shares': [0.251, 0.301, 0.448],
            'macs': 20e6,
            'macs_percent': 53.9,
            'img/s': 1566.2,
            'time_ratio': 0.575,
        },
    ],
    'timing': {'images': 64, 'rounds': 31, 'device': 'cpu'},
    'latency': {
        'batch_size': 1,
        'rounds': 29,
        'device': 'cpu',
        'ms': {'main in timm': 3.1, '0': 1.0123, '1': 1.9, 'main': 3.2},
    },
    'compare': [
        {
            'static model': 'resnet10t',
            'image, px': 48,
            'params': 4900000,
            'GMACs': 0.0215,
            'top-1': 77.75,
            'top-5': 98.8,
        },
    ],
    'overthinking': {'lost': 3.21, 'gained': 9.12, 'right_somewhere': 86.23},
    'training': {
        'command': 'train.py --eed --model resnet18',
        'seed': 42,
        'epochs': 16,
        'exit_loss': 'eed',
        'environment': ENVIRONMENT | {'commit': '1234567'},
    },
    'environment': ENVIRONMENT,
    'has_picture': True,
    'weights': {'model.safetensors': 'ab' * 32, 'exits.safetensors': 'cd' * 32},
}


@pytest.fixture
def metrics():
    return copy.deepcopy(METRICS)


def keep_required(metrics):
    """Return what a card cannot do without, of a model that was never measured."""
    kept = {name: metrics[name] for name in REQUIRED}
    costs = ('exit', 'tap', 'params', 'GMACs fixed', 'GMACs sequential')
    return kept | {'rows': [{name: row[name] for name in costs} for row in metrics['rows']]}


def read_tables(card):
    """Return the tables of a card, each a list of rows: column -> text. Nothing of the library is used."""
    tables, lines = [], []
    for line in [*card.splitlines(), '']:
        if line.startswith('|'):
            assert line.endswith('|')
            lines.append([cell.strip().strip('`') for cell in line[1:-1].split('|')])
        elif lines:
            header, marks, *rows = lines
            assert all(re.fullmatch(':?--+:?', mark) for mark in marks)
            assert {len(row) for row in lines} == {len(header)}
            tables.append([dict(zip(header, row)) for row in rows])
            lines = []
    return tables


def read_blocks(card, language):
    return re.findall(rf'^```{language}\n(.*?)^```$', card, re.DOTALL | re.MULTILINE)


def assert_shows(text, value):
    """Assert that a cell shows a value, to the digits it shows and to 1 in 1000 at least."""
    if value is None:
        assert text == '-'
        return
    digits = len(text.partition('.')[2])
    shown = float(text.replace(',', ''))
    assert abs(shown - value) <= 0.5000001 * 10**-digits, (text, value)
    assert abs(shown - value) <= 1e-3 * abs(value), (text, value)


def test_table_of_exits_has_the_numbers_of_the_metrics(metrics):
    table = read_tables(write_card(metrics))[0]
    assert [row['exit'] for row in table] == ['0', '1', 'main', 'ens', 'main in timm']
    assert [row['at'] for row in table] == ['layer1', 'layer2', 'classifier', '-', 'classifier']
    for shown, row in zip(table, metrics['rows']):
        for name in ('params', 'GMACs fixed', 'GMACs sequential', 'top-1', 'top-5', 'ECE'):
            assert_shows(shown[name], row[name])
        ms = metrics['latency']['ms'].get(row['exit'])
        assert_shows(shown['images/s at 1'], ms and 1000 / ms)
    plain, main = table[-1], metrics['rows'][2]
    assert_shows(plain['images/s at 1'], 322.58)
    for name in ('params', 'GMACs fixed', 'top-1', 'top-5', 'ECE'):
        assert_shows(plain[name], main[name])


def test_table_of_policies_has_the_numbers_of_the_metrics(metrics):
    table = read_tables(write_card(metrics))[1]
    shares = 'leave at 0 / 1 / main, %'
    assert [row['policy'] for row in table] == [row['policy'] for row in metrics['dynamic']]
    for shown, row in zip(table, metrics['dynamic']):
        assert_shows(shown['GMACs'], row['macs'] / 1e9)
        for name, key in (('% of MACs', 'macs_percent'), ('top-1', 'top-1')):
            assert_shows(shown[name], row[key])
    # Above 1 is faster: 1 / 1.061, 1 / 0.465 and 1 / 0.575.
    assert [row['images/s, main = 1'] for row in table] == ['1.00', '0.94', '2.15', '1.74']
    assert [row['thresholds'] for row in table] == ['-', '-', '0.93 / -', '0.9714 / 0.8']
    assert [row[shares] for row in table] == ['-', '-', '40.0 / 0.0 / 60.0', '25.1 / 30.1 / 44.8']
    assert [row['criterion'] for row in table] == ['-', '-', 'confidence', 'confidence, mean of the exits so far']


def test_table_of_static_networks_has_this_one_and_the_others(metrics):
    main, other = read_tables(write_card(metrics))[2]
    assert (main['network'], other['network']) == ('main', 'resnet10t')
    for shown, row, gmacs, side in (
        (main, metrics['rows'][2], 0.0371, 32),
        (other, metrics['compare'][0], 0.0215, 48),
    ):
        for name in ('params', 'top-1', 'top-5'):
            assert_shows(shown[name], row[name])
        assert_shows(shown['GMACs'], gmacs)
        assert_shows(shown['image, px'], side)


def test_notes_say_what_numbers_are_of(metrics):
    card = write_card(metrics)
    for text in (
        'on the `test` split of `cifar10`, 10,000 images; one run (seed 42), no spread is known.',
        'Epoch 12 of 16, chosen by `top1`, on 5000 images held out of train.',
        'Thresholds of `budget 40%`, `budget 0.02GMACs` were chosen on 4000 images held out of train; the numbers are of'
        ' the split above.',
        'above 1 is faster: medians of 31 rounds, in each of which all policies take a batch of 64 images on `cpu` in turn',
        'Images/s at 1 are medians of 29 rounds with a batch of 1 on `cpu`',
        'not that of a plain network trained alone',
        'Networks without exits that were trained alone, and main of this network',
        'wrong at main: 3.21 % of the images; right at main alone: 9.12 %; right at some classifier: 86.23 %',
        '- Measured on 2 x Intel(R) Xeon(R) CPU @ 2.20GHz; 1 torch thread; python 3.11.2, timm 1.0.31, torch 2.15.0;'
        ' timm_multiexit at 5ff385c.',
        'timm_multiexit at 1234567.',
        '`args.yaml`: exit loss `eed`, epochs `16`, seed `42`',
    ):
        assert text in card
    assert read_blocks(card, 'shell') == ['train.py --eed --model resnet18\n']
    assert 'optimistic' not in card


def test_a_split_that_chose_the_epoch_is_named(metrics):
    metrics['epoch']['is_reported_split'] = True
    assert '**the reported split itself**, so the numbers are optimistic' in write_card(metrics)


def test_speed_is_of_one_measurement(metrics):
    # The median of the paired ratios is 0.465, and that of the times gives 900 / 1935.4 = 0.465: here they part.
    metrics['dynamic'][2]['img/s'] = 1234.5
    card = write_card(metrics)
    assert 'relative to main of this network (900 images/s) in the same round, above 1 is faster' in card
    (section,) = re.findall('^## Dynamic inference$(.*?)^(?:## |!)', card, re.DOTALL | re.MULTILINE)
    assert re.findall(r'[0-9,.]+ images/s|1,?23[45]|850|1,?566|1,?935', section) == ['900 images/s']
    assert read_tables(card)[1][2]['images/s, main = 1'] == '2.15'
    assert 'and 2.15 times its images/s' in card
    del metrics['dynamic'][0]['img/s']
    assert 'relative to main of this network in the same round' in write_card(metrics)


def test_precision_is_what_was_measured_in_or_not_said(metrics):
    assert not re.search(r'float|\bamp\b|bf16', write_card(metrics))
    card = write_card(metrics | {'precision': 'amp bfloat16'})
    assert '- Measured on 2 x Intel(R) Xeon(R) CPU @ 2.20GHz; 1 torch thread; amp bfloat16; python' in card
    assert card.count('amp bfloat16') == 1  # training may have had another


def read_alt(card):
    (alt,) = re.findall(r'^!\[([^\[\]]*)\]\(assets/accuracy_vs_macs.png\)$', card, re.MULTILINE)
    return alt


def test_picture_is_described_for_those_who_do_not_see_it(metrics):
    exits = 'exits 0, 1 and main, each alone and with all exits before it'
    saved = 'policies that are saved, the ensemble of all exits'
    about = 'Top-1 accuracy against mean MACs of an image'
    assert read_alt(write_card(metrics)) == f'{about} on the test split of cifar10: {exits}, {saved}, static resnet10t'
    metrics |= {'curve': {'chosen_on': 'train', 'points': [{}]}, 'compare': None, 'dataset': None}
    assert read_alt(write_card(metrics)) == f'{about}: {exits}, policies for budgets, {saved}'
    metrics['has_picture'] = False
    assert 'assets/' not in write_card(metrics)


def test_description_of_the_picture_is_escaped(metrics):
    metrics['dataset']['name'] = metrics['compare'][0]['static model'] = 'a](http://b) `c` <d>'
    escaped = 'a&#93;(http&#58;//b) &#96;c&#96; &#60;d&#62;'
    alt = read_alt(write_card(metrics))
    assert f'split of {escaped}:' in alt
    assert alt.endswith(f'static {escaped}')


@pytest.mark.parametrize(
    ('dataset', 'expected'),
    [
        ({'num_samples': 8}, 'Accuracies are in percent, on 8 images; one run (seed 42), no spread is known.'),
        ({}, 'Accuracies are in percent; one run (seed 42), no spread is known.'),
        ({'split': 'test'}, 'in percent, on the `test` split; one run'),
        ({'name': 'cifar10', 'num_samples': 8}, 'in percent, on `cifar10`, 8 images; one run'),
    ],
    ids=['count', 'nothing', 'split', 'name'],
)
def test_data_are_called_by_what_is_known_of_them(metrics, dataset, expected):
    metrics['dataset'] = dict.fromkeys(('name', 'hub_id', 'split', 'num_samples')) | dataset
    card = write_card(metrics)
    assert expected in card
    name = ' (`cifar10`)' if 'name' in dataset else ''
    assert f'The data{name} have terms of their own, which this license does not replace.' in card
    assert f'of 10 classes{name} with' in card
    assert ('the split above' in card) == ('split' in dataset)
    assert not re.search('[(`]-[)`]|None', card)


def test_default_policy_is_marked_and_told(metrics):
    assert 'default' not in write_card(metrics)
    metrics['dynamic'][3]['is_default'] = True
    card = write_card(metrics)
    assert [line.split(' | ')[0] for line in card.splitlines() if '(default)' in line] == [
        '| `budget 0.02GMACs` (default)'
    ]
    assert '- `model.infer(x)` uses the default policy, `budget 0.02GMACs`.' in card
    assert "model.infer(images, budget='40%')" in card
    assert card.count('default') == 2


def test_two_default_policies_are_refused(metrics):
    for row in metrics['dynamic'][2:]:
        row['is_default'] = True
    with pytest.raises(MultiExitError, match=r"at most one default policy, got \['budget 40%', 'budget 0.02GMACs'\]"):
        write_card(metrics)


EXPECTED_RESULTS = [
    ('Top-1 @ exit 0', 70.1, {'exit': 0, 'gmacs': 0.0101234}),
    ('Top-1 @ exit 1', 78.444, {'exit': 1, 'gmacs': 0.0191}),
    ('Top-1 @ main', 80.8, {'exit': 'main', 'gmacs': 0.0371}),
    ('Top-1 @ ensemble of all exits', 81.2, {'exit': 'ens', 'gmacs': 0.0392}),
    ('Top-1 @ budget 40%', 80.19, {'policy': 'budget 40%', 'gmacs': 0.01477}),
    ('Top-1 @ budget 0.02GMACs', 80.97, {'policy': 'budget 0.02GMACs', 'gmacs': 0.02}),
]


def test_results_round_trip_through_the_hub_s_own_reader(metrics):
    data = ModelCard(write_card(metrics)).data
    expected = [
        EvalResult(
            task_type='image-classification',
            task_name='Image Classification',
            dataset_type='uoft-cs/cifar10',
            dataset_name='cifar10',
            dataset_split='test',
            metric_type='accuracy',
            metric_name=name,
            metric_value=value,
            metric_args=args,
        )
        for name, value, args in EXPECTED_RESULTS
    ]
    assert data.eval_results == expected
    assert data.model_name == 'cifar10-resnet18'
    again = ModelCardData(**yaml.safe_load(data.to_yaml()))
    assert again.eval_results == expected
    assert again.to_dict() == data.to_dict()


def test_metadata_is_what_the_hub_searches_by(metrics):
    metadata = yaml.safe_load(write_card(metrics).split('\n---\n')[0].removeprefix('---\n'))
    del metadata['model-index']
    assert metadata == {
        'base_model': 'timm/resnet18.a1_in1k',
        'base_model_relation': 'finetune',
        'datasets': ['uoft-cs/cifar10'],
        'library_name': 'timm',
        'license': 'apache-2.0',
        'metrics': ['accuracy'],
        'pipeline_tag': 'image-classification',
        'tags': [
            'image-classification',
            'timm',
            'timm_multiexit',
            'multi-exit',
            'early-exit',
            'anytime-inference',
        ],
    }


def test_license_that_the_hub_does_not_list_has_name_and_link(metrics):
    address = 'https://ai.meta.com/resources/models-and-libraries/dinov3-license/'
    metrics['license'] = {'id': 'other', 'name': 'dinov3-license', 'link': address, 'note': 'Passed on.'}
    card = write_card(metrics)
    data = ModelCard(card).data
    assert (data.license, data.license_name, data.license_link) == ('other', 'dinov3-license', address)
    assert f'[`dinov3-license`]({address}). Passed on. The data (`cifar10`) have terms of their own' in card


@pytest.mark.parametrize(
    ('base', 'dataset', 'is_told'),
    [('timm/resnet18.a1_in1k', 'cifar10', True), (None, 'ILSVRC/imagenet-1k', True), (None, 'cifar10', False)],
)
def test_terms_of_imagenet_are_told_where_it_was_used(metrics, base, dataset, is_told):
    metrics['base_model'] = base
    metrics['dataset'] = {'name': dataset}
    assert ('ImageNet' in write_card(metrics)) == is_told


def test_card_of_a_model_that_was_never_measured(metrics):
    card = write_card(keep_required(metrics))
    data = ModelCard(card).data
    assert data.eval_results is None
    assert 'metrics' not in data.to_dict()
    assert 'has not been measured' in card
    (table,) = read_tables(card)
    assert list(table[0]) == ['exit', 'at', 'params', 'GMACs fixed', 'GMACs sequential']
    assert [row['params'] for row in table] == ['157,504', '683,072', '11,181,642', '11,381,642']
    assert len(read_blocks(card, 'python')) == 3
    assert 'None' not in card
    assert '## Training' not in card


@pytest.mark.parametrize(
    'name', ['dataset', 'epoch', 'dynamic', 'timing', 'latency', 'compare', 'overthinking', 'training', 'environment']
)
def test_a_missing_part_and_null_give_the_same_card(metrics, name):
    without = {key: value for key, value in metrics.items() if key != name}
    card = write_card(without)
    assert card == write_card(metrics | {name: None})
    assert card != write_card(metrics)
    assert 'None' not in card


@pytest.mark.parametrize('name', REQUIRED)
def test_what_is_required_must_be_there(metrics, name):
    del metrics[name]
    with pytest.raises(MultiExitError, match=name):
        write_card(metrics)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'format_version': 2}, 'got 2'),
        ({'model_name': 'hf-hub:no-namespace'}, 'Model name must have'),
        ({'model_name': "hf-hub:org/x'); import os; ('"}, 'Model name must have'),
        ({'model_name': 'hf-hub:org/name\n'}, 'Model name must have'),
        ({'model_name': "local-dir:x'); import os; ('"}, 'Model name must have'),
        ({'model_name': 'local-dir:/home/me/x'}, 'Model name must have'),
        ({'input_size': [3, 32]}, 'input_size'),
        ({'input_size': [3, 32, '32)']}, 'input_size'),
        ({'num_classes': 0}, 'num_classes'),
        ({'rows': METRICS['rows'][2:]}, 'at least one exit'),
        ({'rows': METRICS['rows'][:2]}, 'and main'),
        ({'rows': [{'exit': 'main'}]}, 'GMACs fixed'),
        ({'rows': [METRICS['rows'][0], METRICS['rows'][2] | {'GMACs fixed': 0.0}]}, 'GMACs fixed > 0'),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_no_card_can_be_made_of_is_refused_in_one_line(metrics, change, message):
    with pytest.raises(MultiExitError, match=message) as caught:
        write_card(metrics | change)
    assert '\n' not in str(caught.value)


def test_same_metrics_give_the_same_bytes(metrics):
    assert write_card(metrics) == write_card(json.loads(json.dumps(metrics)))


def make_policy(name, top1, percent, **others):
    return {'policy': name, 'top-1': top1, 'macs': percent * 371e3, 'macs_percent': percent, **others}


PLAIN = make_policy('main', 80.8, 100.0, time_ratio=1.0)
ALONE = '; exit `0` alone is 10.70 points below main at 27.3 % of its MACs.'


@pytest.mark.parametrize(
    ('dynamic', 'expected'),
    [
        (
            [make_policy('a', 79.7, 20.0), make_policy('b', 79.9, 30.0, time_ratio=0.5), make_policy('c', 80.8, 60.0)],
            'With `b` it has 79.90 % top-1, 0.90 points below main (80.80 %), at 30.0 % of its MACs and'
            ' 2.00 times its images/s' + ALONE,
        ),
        (
            [make_policy('a', 81.0, 70.0, time_ratio=1.25)],
            'With `a` it has 81.00 % top-1, 0.20 points above main (80.80 %), at 70.0 % of its MACs and'
            ' 0.80 times its images/s' + ALONE,
        ),
        (
            [make_policy('a', 60.0, 20.0), make_policy('b', 79.0, 90.0)],
            'With `b` it has 79.00 % top-1, 1.80 points below main (80.80 %), at 90.0 % of its MACs' + ALONE,
        ),
        (
            [make_policy('a', 79.7, 40.0), make_policy('b', 80.9, 101.5)],
            'With `a` it has 79.70 % top-1, 1.10 points below main (80.80 %), at 40.0 % of its MACs' + ALONE,
        ),
        (
            [make_policy('a', 80.8, 100.0), make_policy('b', 80.9, 101.5)],
            'At exit `1` it has 78.44 % top-1, 2.36 points below main (80.80 %), at 51.5 % of its MACs.',
        ),
        (
            [],
            'At exit `1` it has 78.44 % top-1, 2.36 points below main (80.80 %), at 51.5 % of its MACs.',
        ),
    ],
    ids=[
        'cheapest within a point',
        'better and slower',
        'none within a point',
        'dearer than main',
        'all dear',
        'exits alone',
    ],
)
def test_headline_is_the_cheapest_trade_within_a_point(metrics, dynamic, expected):
    metrics['dynamic'] = [PLAIN, *dynamic]
    assert headline(metrics) == expected
    assert expected in write_card(metrics)


def test_headline_without_measured_exits(metrics):
    metrics['dynamic'] = None
    for row in metrics['rows']:
        if row['exit'] != 'main':
            del row['top-1']
    assert headline(metrics) == 'Main has 80.80 % top-1; its exits have not been measured.'


def test_headline_where_nothing_costs_less_is_about_main(metrics):
    metrics['dynamic'] = [PLAIN, make_policy('a', 81.0, 101.5)]
    for row in metrics['rows'][:2]:
        row['GMACs fixed'] = 0.0372
    assert headline(metrics) == 'Main has 80.80 % top-1; nothing that was measured costs fewer MACs.'
    metrics['dynamic'].append(make_policy('b', 80.0, 90.0))
    assert headline(metrics) == (
        'With `b` it has 80.00 % top-1, 0.80 points below main (80.80 %), at 90.0 % of its MACs.'
    )


def test_several_labels_are_compared_by_map(metrics):
    del metrics['dynamic']
    for row, value in zip(metrics['rows'], (60.0, 70.5, 71.0, 72.0)):
        for name in ('top-1', 'top-5', 'ECE'):
            del row[name]
        row |= {'mAP': value, 'micro-F1': value - 10}
    card = write_card(metrics)
    assert 'At exit `1` it has 70.50 % mAP, 0.50 points below main (71.00 %)' in card
    results = ModelCard(card).data.eval_results
    assert [result.metric_name for result in results][:2] == ['mAP @ exit 0', 'mAP @ exit 1']
    assert [result.metric_value for result in results] == [60.0, 70.5, 71.0, 72.0]
    for shown, row in zip(read_tables(card)[0], metrics['rows']):
        assert_shows(shown['mAP'], row['mAP'])
        assert_shows(shown['micro-F1'], row['micro-F1'])
    assert 'infer(' not in card  # its confidence is of one class


HOSTILE = 'a|b\n---\nlicense: mit\n| x | `<script>alert(1)</script>` [y](javascript:z) ![](http://i/g.png) ```\n# H'


def poison(metrics):
    """Put hostile text wherever metrics.json has a text that somebody chose."""
    metrics['architecture'] = HOSTILE
    metrics['base_model'] = HOSTILE
    metrics['dataset'] |= {'name': HOSTILE, 'hub_id': HOSTILE, 'split': HOSTILE}
    metrics['license'] = {'id': HOSTILE, 'name': HOSTILE, 'link': f'https://x) {HOSTILE}', 'note': HOSTILE}
    metrics['epoch'] |= {'chosen_by': HOSTILE, 'chosen_on': HOSTILE}
    metrics['dynamic'][2] |= {'policy': HOSTILE, 'chosen_on': HOSTILE, 'criterion': HOSTILE, 'combine': HOSTILE}
    metrics['dynamic'][2]['is_default'] = True
    metrics['timing']['device'] = metrics['latency']['device'] = HOSTILE
    metrics['compare'][0]['static model'] = HOSTILE
    metrics['training'] |= {'command': HOSTILE, 'exit_loss': HOSTILE, 'seed': HOSTILE, 'recipe': HOSTILE}
    for environment in (metrics['environment'], metrics['training']['environment']):
        environment |= dict.fromkeys(environment, HOSTILE)
    metrics['weights'] = {HOSTILE: HOSTILE}
    for row in metrics['rows']:
        row['tap'] = HOSTILE
        row[HOSTILE] = HOSTILE
    return metrics


def test_hostile_names_change_no_table_and_no_metadata(metrics):
    good, bad = write_card(metrics), write_card(poison(copy.deepcopy(metrics)))
    assert [len(table) for table in read_tables(bad)] == [5, 4, 2, 1]
    assert bad.count('(default)') == 1
    # One more column in the first table: the metric of a hostile name.
    widths = [[len(table[0]) for table in read_tables(card)] for card in (good, bad)]
    assert widths == [[9, 8, 6, 2], [10, 8, 6, 2]]
    for row, shown in zip(metrics['rows'], read_tables(bad)[0]):
        assert_shows(shown['top-1'], row['top-1'])
    metadata = [yaml.safe_load(card.split('\n---\n')[0].removeprefix('---\n')) for card in (good, bad)]
    assert set(metadata[1]) == set(metadata[0]) - {'datasets', 'base_model', 'base_model_relation'} | {
        'license_name',
        'license_link',
    }
    assert metadata[1]['license'] == one_line(HOSTILE)
    assert len(ModelCard(bad).data.eval_results) == len(EXPECTED_RESULTS)
    headings = [
        re.findall('^#.*$', re.sub('^(```+).*?^\\1$', '', card, flags=re.S | re.M), re.M) for card in (good, bad)
    ]
    assert headings[0] == headings[1]


def test_hostile_names_are_no_markup(metrics):
    card = write_card(poison(metrics))
    body = card.split('\n---\n', 1)[1]
    prose = re.sub('^(````*)[a-z]*\n.*?^\\1$', '', body, flags=re.DOTALL | re.MULTILINE)
    assert '<' not in prose
    assert prose.count('](') == 1  # the picture
    assert all(line.count('`') % 2 == 0 for line in prose.splitlines())
    (command,) = re.findall('^(`+)shell\n(.*)\n(`+)$', body, re.MULTILINE)
    assert command[0] == command[2] == '````'
    assert command[1] == one_line(HOSTILE)
    assert len(read_blocks(body, 'python')) == 3
    for block in read_blocks(body, 'python'):
        compile(block, 'card', 'exec')


@pytest.mark.parametrize('value', [float('nan'), float('inf'), None, True])
def test_what_is_no_number_is_neither_shown_nor_a_result(metrics, value):
    metrics['rows'][0]['top-1'] = value
    card = write_card(metrics)
    assert read_tables(card)[0][0]['top-1'] == '-'
    assert 'Top-1 @ exit 0' not in [result.metric_name for result in ModelCard(card).data.eval_results]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder of a small network that knows budgets, and one of them."""
    torch.manual_seed(0)
    model = tme.create_model('test_resnet', exits=[1, 2], num_classes=10, input_size=(3, 32, 32)).eval()
    images = TensorDataset(torch.randn(64, 3, 32, 32), torch.arange(64) % 10)
    model.calibrate(DataLoader(images, batch_size=64), budget='100%')
    path = tmp_path_factory.mktemp('card') / 'net'
    tme.save_pretrained(model, path, data_config={'input_size': (3, 32, 32)})
    return path


def run_snippets(card, folder, idx=slice(2)):
    """Return what Python blocks of a card leave behind, run as printed but for where the model is; idx chooses them."""
    names = []
    for block in read_blocks(card, 'python')[idx]:
        assert block.count("'hf-hub:org/cifar10-resnet18'") == 1
        names.append({})
        exec(compile(block.replace('hf-hub:org/cifar10-resnet18', f'local-dir:{folder}'), 'card', 'exec'), names[-1])
    return names


def test_snippets_run_as_printed(metrics, folder, capsys):
    metrics['dynamic'][2]['policy'] = 'budget 100%'
    card = write_card(metrics)
    plain, everything = run_snippets(card, folder)
    assert [logits.shape for logits in everything['outputs'].logits] == 3 * [(4, 10)]
    assert torch.equal(everything['early'], everything['outputs'].logits[0])
    assert everything['data_config']['input_size'] == (3, 32, 32)
    assert "model.infer(images, budget='100%')" in card
    model = everything['model']
    expected = tme.apply_policy(model.budgets.select('100%').policy, model(everything['images'], exits=True).logits)
    assert torch.equal(everything['prediction'].exit_idx, expected.exit_idx)
    assert (everything['k'], everything['logits'].shape) == (2, (4, 10))
    assert not isinstance(plain['model'], tme.MultiExitModel)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(plain['model'](images), everything['model'](images))
    assert plain['logits'].shape == (4, 10)
    assert len(capsys.readouterr().out.splitlines()) >= 4


@pytest.mark.slow
def test_snippet_of_onnx_runtime_runs_as_printed(metrics, folder, tmp_path, monkeypatch):
    pytest.importorskip('onnxruntime')
    monkeypatch.chdir(tmp_path)
    metrics['dynamic'][2]['policy'] = 'budget 100%'
    (names,) = run_snippets(write_card(metrics), folder, slice(2, 3))
    model, images = names['model'], torch.from_numpy(names['images'])
    expected = model.infer(images, budget='100%')
    torch.testing.assert_close(torch.from_numpy(names['logits']), expected.logits, rtol=1e-4, atol=1e-5)
    assert names['exit_idx'].tolist() == expected.exit_idx.tolist()


def test_results_for_leaderboards_are_read_by_the_hub_s_client(metrics):
    entries = parse_eval_result_entries(yaml.safe_load(write_eval_results(metrics)))
    assert {(entry.dataset_id, entry.task_id) for entry in entries} == {('uoft-cs/cifar10', 'default')}
    expected = [EXPECTED_RESULTS[2], *EXPECTED_RESULTS[:2], *EXPECTED_RESULTS[3:]]  # main first
    assert [entry.value for entry in entries] == [value for _, value, _ in expected]
    assert [entry.notes for entry in entries][:2] == [
        'Top-1 @ main, 0.0371 GMACs, test split', 'Top-1 @ exit 0, 0.01012 GMACs, test split'
    ]  # fmt: skip
    assert len({entry.notes for entry in entries}) == len(entries)


@pytest.mark.parametrize('dataset', [None, {'name': 'mine', 'hub_id': None}, {'name': 'x', 'hub_id': HOSTILE}])
def test_without_a_data_set_of_the_hub_there_are_no_results_for_leaderboards(metrics, dataset):
    assert write_eval_results(metrics | {'dataset': dataset}) is None
    assert write_eval_results(keep_required(metrics)) is None


def test_transform_of_the_snippet_prepares_an_image(metrics, folder):
    from PIL import Image

    everything = run_snippets(write_card(metrics | {'dynamic': None}), folder)[1]
    image = everything['transform'](Image.new('RGB', (50, 40)))
    assert image.shape == (3, 32, 32)


def test_without_a_measured_budget_the_snippet_has_a_threshold(metrics, folder):
    metrics['dynamic'] = metrics['dynamic'][:2] + [metrics['dynamic'][2] | {'policy': "budget 4%', x"}]
    card = write_card(metrics)
    assert 'budget=' not in card
    prediction = run_snippets(card, folder)[1]['prediction']
    assert prediction.exit_idx.shape == (4,)


def test_without_a_measured_budget_the_snippet_has_the_default_policy(metrics, folder):
    metrics['dynamic'] = metrics['dynamic'][:2] + [metrics['dynamic'][2] | {'policy': 'max drop 1', 'is_default': True}]
    card = write_card(metrics)
    assert 'prediction = model.infer(images)  # by the default policy\n' in card
    everything = run_snippets(card, folder)[1]
    model, images = everything['model'], everything['images']
    expected = tme.apply_policy(model.policy, model(images, exits=True).logits)
    assert torch.equal(everything['prediction'].exit_idx, expected.exit_idx)


def test_plain_timm_is_told_of_an_architecture_of_ours(metrics):
    assert 'import timm_multiexit' not in read_blocks(write_card(metrics), 'python')[0]
    metrics |= {'needs_import': True, 'architecture': 'cifar_resnet18'}
    card = write_card(metrics)
    block = read_blocks(card, 'python')[0]
    assert 0 < block.index('import timm_multiexit') < block.index('timm.create_model')
    assert 'knows `cifar_resnet18` only after `import timm_multiexit`' in card
    compile(block, 'card', 'exec')


def test_snippets_have_the_size_and_classes_of_the_model(metrics):
    metrics |= {'input_size': [1, 64, 48], 'num_classes': 7}
    blocks = read_blocks(write_card(metrics), 'python')
    assert all('torch.randn(4, 1, 64, 48)' in block for block in blocks)
    assert all('[4, 7]' in block for block in blocks)


@pytest.mark.parametrize(
    ('text', 'shown'),
    [
        ('layer1.0.conv_2', 'layer1.0.conv_2'),
        ('uoft-cs/cifar10', 'uoft-cs/cifar10'),
        ('**b**', '&#42;&#42;b&#42;&#42;'),
        ('_i_', '&#95;i&#95;'),
        ('~~s~~', '&#126;&#126;s&#126;&#126;'),
        ('\\|', '&#92;&#124;'),
        ('&lt;', '&#38;lt;'),
        ('$x$', '&#36;x&#36;'),
        ('me@example.org', 'me&#64;example.org'),
        ('www.example.org', 'www&#46;example.org'),
        ('https://example.org', 'https&#58;//example.org'),
        ('\u202eabc\x00\x1b[0m', 'abc &#91;0m'),
        ('caf\u00e9', 'caf\u00e9'),
    ],
)
def test_escaped_text_is_shown_as_it_is(text, shown):
    assert escape(text) == shown


def test_code_links_fences_and_numbers():
    assert (code('layer1.0'), code('a`b'), code('-'), code(None)) == ('`layer1.0`', 'a&#96;b', '-', '-')
    assert link('t', 'https://a.b/c_d?e=f#g') == '[t](https://a.b/c_d?e=f#g)'
    assert [link('t', address) for address in ('http://a', 'javascript:x', 'https://a) b', '')] == 4 * ['t']
    assert fence('a ```` b', 'shell') == '`````shell\na ```` b\n`````'
    assert [number(value) for value in (0, 12, 1234567, 0.0, 0.00001234, 12.3456, 98765.4)] == [
        '0',
        '12',
        '1,234,567',
        '0',
        '1.234e-05',
        '12.35',
        '98,765',
    ]


def test_card_has_the_cascade_and_what_it_is_compared_with(metrics):
    assert 'cascade' not in write_card(metrics)
    result = {'top-1': 79.0, 'macs': 12e6}
    metrics['rivals'] = {
        'rows': [
            {'kind': 'main', 'name': 'main', 'top-1': 80.8, 'macs': 37.1e6, 'img/s': {'1': 90.5, '64': 900.0}},
            {'kind': 'own', 'name': 'budget 40%', 'top-1': 80.19, 'macs': 14.77e6, 'img/s': {'1': 95.0, '64': 1935.0}},
            {'kind': 'cascade', 'name': 'cascade, MACs of budget 40%', **result, 'img/s': {'1': 91.0, '64': 1500.0}},
            {'kind': 'static', 'name': 'small|net', 'top-1': 75.0, 'macs': 9e6},
        ],
        'cascade': {
            'small': 'small|net',
            'large': 'large',
            'chosen_on': '4000 images held out of train',
            'pairs': [
                {'own': {'top-1': 80.0, 'macs': 5.0}, 'cascade': {'top-1': 79.0, 'macs': 5.0}},
                {'own': {'top-1': 70.0}, 'cascade': None},
            ],
        },
        'timing': {'rounds': 5, 'device': 'cpu', 'batch_sizes': [1, 64]},
    }
    card = write_card(metrics)
    table = read_tables(card)[3]
    assert len(table) == 4
    for shown, row in zip(table, metrics['rivals']['rows']):
        assert shown['kind'] == row['kind']
        assert_shows(shown['top-1'], row['top-1'])
        assert_shows(shown['GMACs'], row['macs'] / 1e9)
        assert_shows(shown['images/s at 64'], (row.get('img/s') or {}).get('64'))
    assert (
        'At 1 equal budgets, own exits match or beat the cascade at 1, in 1 of 1 pairs of policies; 1 more budgets are'
        in card
    )
    assert 'medians of 5 rounds, in turns, on `cpu`' in card
    assert 'a cascade of two models' in read_alt(card)
