"""The analysis of runs: every number against a slow oracle or worked by hand, and the pictures that are drawn of them."""

import builtins
import csv
import json
import math
import shutil
import statistics
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import write_images
from helpers.runs import script_state
from PIL import Image
from timm.data import create_transform, resolve_data_config

import timm_multiexit as tme
from timm_multiexit.analysis.agreement import (
    agreement_matrix,
    describe_agreement,
    frequent_pairs,
    outcome_confusion,
    predict,
    prediction_confusion,
)
from timm_multiexit.analysis.architecture import accuracy_over_macs, describe_architecture, draw_architecture
from timm_multiexit.analysis.curves import describe_curve, epochs_to_keep, epochs_to_reach, instability, read_curve
from timm_multiexit.analysis.dissimilarity import (
    block_means,
    choose_samples,
    class_means,
    dissimilarity_matrix,
)
from timm_multiexit.analysis.diversity import describe_members, pairwise_disagreement, softmax_variance
from timm_multiexit.analysis.line_figures import (
    draw_accuracy_over_macs,
    draw_diversity,
    draw_main_and_ensemble,
    draw_training,
)
from timm_multiexit.analysis.matrix_figures import draw_agreement, draw_dissimilarity
from timm_multiexit.analysis.measuring import measure_top1
from timm_multiexit.analysis.runs import Run, find_reference, name_folders, name_method, read_runs, teacher_members
from timm_multiexit.analysis.study import Study, format_json
from timm_multiexit.cli import train
from timm_multiexit.cli.analyze import complete_args, create_analyze_parser, main

FLAGS = '--model test_resnet --img-size 32 -b 8 -j 0 --opt adamw --lr 0.002'
RUNS = {
    'ce': '--exits 1,3 --exit-loss ce --epochs 3',
    'eed': '--exits 1,2,3 --eed --epochs 2',
    'part': '--exits 1,3 --eed --exit-teacher 0,-1 --exit-output-loss mse --epochs 1',
    'plain': '--epochs 2',
}


def labels(text):
    return torch.tensor([int(item) for item in text])


def random_logits(count=3, num=40, classes=5):
    return [torch.randn(num, classes) for _ in range(count)]


# Agreement


def test_predictions_end_with_those_of_the_mean_logits():
    logits = [torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, 0.5]])]
    assert predict(logits).tolist() == [[0], [1], [1], [0]]  # the mean is 1.0 and 0.83


def test_agreement_is_counted_image_by_image():
    predictions = torch.randint(0, 3, (4, 50))
    expected = [[sum(int(a == b) for a, b in zip(one, other)) / 50 for other in predictions] for one in predictions]
    assert torch.allclose(agreement_matrix(predictions), torch.tensor(expected).double())


def test_outcomes_are_counted_image_by_image():
    predictions, targets = torch.randint(0, 3, (3, 50)), torch.randint(0, 3, (50,))
    expected = np.zeros((3, 3, 2, 2))
    for i in range(3):
        for j in range(3):
            for n in range(50):
                expected[i, j, int(predictions[i, n] != targets[n]), int(predictions[j, n] != targets[n])] += 1 / 50
    assert np.allclose(outcome_confusion(predictions, targets), expected)


def test_confusion_of_predictions_has_the_first_in_rows():
    confusion = prediction_confusion(labels('0022'), labels('0120'), 3)
    assert confusion.tolist() == [[0.25, 0.25, 0], [0, 0, 0], [0.25, 0, 0.25]]


def test_frequent_pairs_are_of_different_predictions_most_frequent_first():
    assert frequent_pairs(labels('00001122'), labels('00001112')[[0, 4, 4, 7, 0, 1, 7, 0]]) == [
        (0, 1, 0.25),
        (1, 0, 0.25),
        (0, 2, 0.125),
        (2, 0, 0.125),
    ]
    assert frequent_pairs(labels('01'), labels('01')) == []


def test_confusions_of_many_classes_are_left_out():
    targets = torch.zeros(4, dtype=torch.long)
    assert set(describe_agreement([torch.randn(4, 100)] * 2, targets)['confusions']) == {'exit0'}
    assert describe_agreement([torch.randn(4, 101)] * 2, targets)['confusions'] == {}


def test_targets_of_other_classes_are_refused():
    with pytest.raises(tme.MultiExitError, match='targets from 0 to 7, the network 5 classes'):
        describe_agreement(random_logits(num=2), torch.tensor([0, 7]))


# Curves

ROWS = [
    {'epoch': 0, 'eval_top1': 10.0, 'eval_ens_top1': 14.0},
    {'epoch': 1, 'eval_top1': 30.0, 'eval_ens_top1': 31.0},
    {'epoch': 2},  # not evaluated
    {'epoch': 3, 'eval_top1': 20.0, 'eval_ens_top1': 29.0},
    {'epoch': 4, 'eval_top1': math.nan, 'eval_ens_top1': 1.0},
    {'epoch': 5, 'eval_top1': 40.0, 'eval_ens_top1': 42.0},
]


def test_curve_has_the_epochs_that_were_evaluated():
    curve = read_curve(ROWS)
    assert curve == {
        'epochs': [1, 2, 4, 6],
        'main': [10.0, 30.0, 20.0, 40.0],
        'ensemble': [14.0, 31.0, 29.0, 42.0],
    }
    assert read_curve([{'epoch': 0, 'eval_top1': 5.0}]) == {'epochs': [1], 'main': [5.0], 'ensemble': []}
    assert read_curve([{'epoch': 0, 'train_loss': 5.0}]) == {'epochs': [], 'main': [], 'ensemble': []}
    assert read_curve([{'epoch': 0, 'eval_map': 5.0}], 'map')['main'] == [5.0]


@pytest.mark.parametrize(
    ('values', 'target', 'reached', 'kept'),
    [
        ([10, 30, 20, 40], 25, 2, 6),
        ([10, 30, 30, 40], 30, 2, 2),
        ([50, 50, 50, 50], 25, 1, 1),
        ([10, 90, 20, 20], 25, 2, None),
        ([10, 20, 20, 20], 25, None, None),
        ([10, 20, 20, 25], 25, 6, 6),
    ],
    ids=['again', 'equal', 'at-once', 'lost', 'never', 'at-last'],
)
def test_fast_is_when_the_target_is_reached_and_kept(values, target, reached, kept):
    epochs = [1, 2, 4, 6]
    assert (epochs_to_reach(epochs, values, target), epochs_to_keep(epochs, values, target)) == (reached, kept)
    # The definition, the slow way.
    slow = [e for i, e in enumerate(epochs) if all(value >= target for value in values[i:])]
    assert kept == (min(slow) if slow else None)


@pytest.mark.parametrize(
    ('values', 'expected'),
    [
        ([0, 50, 60, 61, 62, 63], 0),  # changes 50, 10, 1, 1, 1: a steady rise counts nothing
        ([0, 50, 60, 61, 59, 62], statistics.pstdev([1, -2, 3])),
        ([0, 50, 60, 59, 61], statistics.pstdev([-1, 2])),
        ([0, 1, 3], None),  # one change in the last half
        ([], None),
    ],
    ids=['steady', 'odd', 'even', 'short', 'empty'],
)
def test_stable_is_the_deviation_of_the_changes_in_the_last_half(values, expected):
    assert instability(values) == expected


def test_curve_is_described_against_the_reference():
    described = describe_curve(read_curve(ROWS), 20.0)
    assert described['gap'] == [4.0, 1.0, 9.0, 2.0]
    assert (described['final_gap'], described['mean_gap'], described['final_main']) == (2.0, 5.5, 40.0)
    assert (described['epochs_to_reach'], described['epochs_to_keep']) == (2, 2)
    assert described['instability'] == 15.0  # changes 20, -10, 20: the last two deviate by 15 from their mean of 5
    nothing = describe_curve(read_curve([]), None)
    assert {key: value for key, value in nothing.items() if value not in (None, [])} == {}


# Dissimilarity


def test_dissimilarity_is_one_less_pearsons_correlation():
    vectors = torch.randn(12, 7)
    expected = 1 - np.corrcoef(vectors.double().numpy())
    assert np.allclose(dissimilarity_matrix(vectors), expected, atol=1e-12)
    maps = torch.randn(3, 2, 2, 2)
    assert torch.equal(dissimilarity_matrix(maps), dissimilarity_matrix(maps.reshape(3, 8)))


@pytest.mark.parametrize('value', [0.0, 0.1, 1e6])
def test_constant_features_are_like_nothing(value):
    matrix = dissimilarity_matrix(torch.stack([torch.full((7,), value), torch.full((7,), value), torch.arange(7.0)]))
    assert matrix.tolist() == [[0, 1, 1], [1, 0, 1], [1, 1, 0]]


def test_block_and_class_means_are_means_over_pairs():
    vectors, targets = torch.randn(9, 6), labels('002222557')
    matrix = dissimilarity_matrix(vectors)
    pairs = [(i, j) for i in range(9) for j in range(9) if i != j]
    within = statistics.fmean(matrix[i, j].item() for i, j in pairs if targets[i] == targets[j])
    between = statistics.fmean(matrix[i, j].item() for i, j in pairs if targets[i] != targets[j])
    found = block_means(matrix, targets)
    assert found == pytest.approx({'within': within, 'between': between, 'ratio': between / within}, abs=2e-5)
    means = class_means(matrix, targets)
    for a, one in enumerate((0, 2, 5, 7)):
        for b, other in enumerate((0, 2, 5, 7)):
            values = [matrix[i, j].item() for i, j in pairs if (targets[i], targets[j]) == (one, other)]
            expected = statistics.fmean(values) if values else math.nan
            assert means[a, b].item() == pytest.approx(expected, nan_ok=True)


def test_means_without_pairs_are_none():
    ones = torch.ones(2, 2)
    assert block_means(ones, labels('01')) == {'within': None, 'between': 1.0, 'ratio': None}
    assert block_means(ones, labels('00')) == {'within': 1.0, 'between': None, 'ratio': None}


def test_samples_are_as_many_of_each_class_and_sorted_by_class():
    targets = torch.randint(0, 10, (2000,))
    places = choose_samples(targets, 500, seed=3)
    chosen = targets[places]
    assert len(set(places)) == len(places) == 500
    assert chosen.bincount().tolist() == [50] * 10
    assert chosen.tolist() == sorted(chosen.tolist())
    assert places == choose_samples(targets, 500, seed=3)
    assert places != choose_samples(targets, 500, seed=4)


def test_of_many_classes_some_are_chosen_with_ten_images_each():
    targets = torch.arange(100).repeat(30)
    chosen = targets[choose_samples(targets, 55)]
    assert sorted(chosen.unique(return_counts=True)[1].tolist()) == [11] * 5
    assert targets[choose_samples(targets, 3)].unique(return_counts=True)[1].tolist() == [2, 1]


def test_few_images_are_all_taken():
    targets = labels('1001')
    assert sorted(choose_samples(targets, 500)) == [0, 1, 2, 3]


# Diversity


def test_disagreement_is_the_mean_over_pairs_of_members():
    predictions = torch.randint(0, 3, (4, 30))
    shares = [sum(int(a != b) for a, b in zip(predictions[i], predictions[j])) / 30 for i in range(4) for j in range(i)]
    assert pairwise_disagreement(predictions) == pytest.approx(statistics.fmean(shares))
    assert pairwise_disagreement(predictions[:1]) is None


def test_softmax_variance_is_over_members_summed_over_classes(monkeypatch):
    monkeypatch.setattr('timm_multiexit.analysis.diversity._CHUNK', 7)
    logits = random_logits(num=20, classes=3)
    probabilities = [single.double().softmax(-1).tolist() for single in logits]
    expected = statistics.fmean(
        sum(statistics.pvariance([single[n][c] for single in probabilities]) for c in range(3)) for n in range(20)
    )
    assert softmax_variance(logits) == pytest.approx(expected)
    assert softmax_variance(logits[:1]) is None


def test_members_are_named_and_measured_alone():
    logits, targets = random_logits(), torch.randint(0, 5, (40,))
    described = describe_members(logits, targets, {0: 0.25, 2: 0.75})
    mean = logits[0] + 3 * logits[2]
    assert described['members'] == ['exit0', 'main']
    assert described['top1'] == pytest.approx(100 * (mean.argmax(-1) == targets).float().mean().item())
    assert described['disagreement'] == pairwise_disagreement(predict(logits)[[0, 2]])
    assert described['softmax_variance'] == softmax_variance([logits[0], logits[2]])


@pytest.mark.parametrize(
    ('values', 'members'),
    [
        ({'exit_loss': 'ce'}, {}),
        ({'exit_loss': 'phuong'}, {2: 1.0}),
        ({'exit_loss': 'eed'}, {0: 1 / 3, 1: 1 / 3, 2: 1 / 3}),
        ({'exit_loss': 'eed', 'exit_teacher': [-1, 0]}, {0: 0.5, 2: 0.5}),
        ({'exit_loss': 'ce', 'exit_teacher': 'main'}, {2: 1.0}),
        ({'exit_loss': 'beed'}, {0: 1 / 5.16, 1: 1.6 / 5.16, 2: 2.56 / 5.16}),
        ({'exits': None, 'exit_loss': None}, {}),
    ],
    ids=['ce', 'phuong', 'eed', 'subset', 'ce-main', 'beed', 'plain'],
)
def test_teacher_is_that_of_the_flags_else_of_the_loss(values, members):
    assert teacher_members(Namespace(**{'exits': 'auto', 'exit_teacher': None, **values}), 2) == pytest.approx(members)


@pytest.mark.parametrize(
    ('values', 'name'),
    [
        ({'exits': None, 'exit_loss': None}, 'plain'),
        ({'exit_loss': 'ce'}, 'ce'),
        ({'exit_loss': 'eed'}, 'eed-kl'),
        ({'exit_loss': 'phuong', 'exit_output_loss': 'mse'}, 'phuong-mse'),
        ({'exit_loss': 'eed', 'exit_feature_weight': 1.0, 'exit_teacher': 'main'}, 'eed-kl-teachermain-features'),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
)
def test_methods_have_names(values, name):
    assert name_method(Namespace(**{'exits': 'auto', **values})) == name


# Costs


def test_architecture_adds_up_to_the_costs_of_the_model(make_model):
    model = make_model(exits=[1, 3], head='conv')
    found = describe_architecture(model, (3, 64, 64))
    costs = model.cost((3, 64, 64))
    stages, exits = found['stages'], found['exits']
    # test_resnet: layer1 has 32 channels at a quarter of the side, layer3 192 at a sixteenth, the end 96 at 1/32.
    assert [(stage['to'], stage['channels'], stage['size'], stage['exit']) for stage in stages] == [
        (model.exits.specs[0].module, 32, [16, 16], 0),
        (model.exits.specs[1].module, 192, [4, 4], 1),
        ('main', 96, [2, 2], None),
    ]
    assert sum(stage['macs'] for stage in stages) == costs[-1].fixed.macs
    assert stages[0]['macs'] + exits[0]['macs'] == costs[0].fixed.macs
    assert stages[0]['macs'] + stages[1]['macs'] + exits[0]['macs'] + exits[1]['macs'] == costs[1].sequential.macs
    assert [head['params'] for head in exits] == [sum(p.numel() for p in head.parameters()) for head in model.exits]


def test_accuracy_over_macs_charges_the_ensemble_with_everything(make_model):
    model = make_model(exits=[1, 3])
    costs = model.cost((3, 64, 64))
    points = accuracy_over_macs(model, {'exit0': 1.0, 'exit1': 2.0, 'main': 3.0, 'ens': 4.0}, (3, 64, 64))
    assert [point['fixed'] for point in points] == [*(cost.fixed.macs for cost in costs), None]
    assert [point['sequential'] for point in points] == [
        *(cost.sequential.macs for cost in costs),
        costs[-1].sequential.macs,
    ]
    assert [(point['classifier'], point['top1']) for point in points][2:] == [('main', 3.0), ('ens', 4.0)]


def test_top1_of_one_classifier_has_no_ensemble():
    logits, targets = random_logits(1), torch.randint(0, 5, (40,))
    assert set(measure_top1(logits, targets)) == {'main'}
    assert set(measure_top1(logits * 2, targets)) == {'exit0', 'main', 'ens'}


# Pictures, read back from the figures

CURVES = {
    'a/ce': describe_curve({'epochs': [1, 2, 3], 'main': [1.0, 5.0, 3.0], 'ensemble': [4.0, 6.0, 5.0]}, 3.0),
    'eed': describe_curve(
        {'epochs': [1, 2, 3, 4], 'main': [2.0, 2.0, 6.0, 7.0], 'ensemble': [2.0, 3.0, 6.0, 7.0]}, 3.0
    ),
}


def line_data(axes):
    return {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}


def test_main_and_ensemble_are_drawn_for_each_run():
    figure = draw_main_and_ensemble(CURVES, 'top-1 accuracy, %')
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in shown] == [
        'a/ce\nensemble - main: +2.00 at the end',
        'eed\nensemble - main: +0.00 at the end',
    ]
    assert line_data(shown[0]) == {
        'ensemble': [[1, 4.0], [2, 6.0], [3, 5.0]],
        'main': [[1, 1.0], [2, 5.0], [3, 3.0]],
    }


def test_training_shows_the_reference_and_when_it_is_reached():
    figure = draw_training(CURVES, 'top-1 accuracy, %', 'a/ce')
    lines = line_data(figure.axes[0])
    assert list(lines) == [
        'a/ce',
        'eed, at a/ce from epoch 3, deviation of changes 1.50',
        'a/ce at the end: 3.00',
    ]
    assert lines['a/ce'] == [[1, 1.0], [2, 5.0], [3, 3.0]]
    assert {y for _, y in lines['a/ce at the end: 3.00']} == {3.0}
    assert len(draw_training(CURVES, 'x', None).axes[0].get_lines()) == 2


def test_accuracy_over_macs_is_drawn_fixed_and_in_sequence():
    points = {
        'eed': [
            {'classifier': 'exit0', 'fixed': 1e6, 'sequential': 1e6, 'top1': 50.0},
            {'classifier': 'main', 'fixed': 3e6, 'sequential': 4e6, 'top1': 70.0},
            {'classifier': 'ens', 'fixed': None, 'sequential': 4e6, 'top1': 72.0},
        ],
        'plain': [{'classifier': 'main', 'fixed': 3e6, 'sequential': 3e6, 'top1': 69.0}],
    }
    axes = draw_accuracy_over_macs(points, '').axes[0]
    lines = line_data(axes)
    assert axes.get_xlabel() == 'cost of an image, MMACs'
    assert lines['eed, one exit alone'] == [[1, 50], [3, 70]]
    assert lines['eed, in sequence'] == [[1, 50], [4, 70]]
    assert lines['eed, ensemble'] == [[4, 72]]
    assert lines['plain'] == [[3, 69]]


def test_diversity_is_drawn_against_both_gains():
    teacher = {'members': ['exit0', 'main'], 'disagreement': 0.25, 'softmax_variance': 0.1}
    figure = draw_diversity({'eed': {'teacher': teacher, 'gain': {'main': 1.5, 'ens': -0.5}}}, 'ce')
    left, right = figure.axes
    assert line_data(left)['eed (exit0+main): main'] == [[25, 1.5]]
    assert line_data(left)['eed (exit0+main): ensemble'] == [[25, -0.5]]
    assert [line.get_xydata().tolist() for line in right.get_lines()][:2] == [[[0.1, 1.5]], [[0.1, -0.5]]]


def test_agreement_is_drawn_in_percent_without_the_diagonal_of_confusions():
    logits = random_logits()
    targets = logits[-1].argmax(-1)  # main is always right, so that rows and columns differ
    numbers = describe_agreement(logits, targets)
    figure = draw_agreement(numbers, 'net', list('abcde'))
    same, first, second, *_ = figure.axes
    assert np.array_equal(same.get_images()[0].get_array(), numbers['same_prediction'])
    assert [text.get_text() for text in first.texts] == [
        f'{100 * share:.1f}' for row in numbers['outcomes'][0][2] for share in row
    ]
    assert (second.get_xlabel(), second.get_ylabel()) == ('main', 'exit1')
    confusion = next(axes for axes in figure.axes if axes.get_ylabel() == 'class by exit1')
    drawn = np.ma.filled(confusion.get_images()[0].get_array(), np.nan)
    expected = 100 * np.array(numbers['confusions']['exit1'])
    assert np.isnan(np.diag(drawn)).all()
    assert np.allclose(drawn[~np.eye(5, dtype=bool)], expected[~np.eye(5, dtype=bool)])
    assert [label.get_text() for label in confusion.get_xticklabels()] == list('abcde')


def test_agreement_of_many_classes_is_drawn_without_confusions():
    numbers = describe_agreement(random_logits(2, classes=101), torch.zeros(40, dtype=torch.long))
    assert [axes.get_title() for axes in draw_agreement(numbers, '').axes] == [
        'same prediction, % of images',
        'exit0 and main, % of images',
    ]


def test_dissimilarity_is_drawn_before_and_after_every_linear_layer():
    means = {'within': 0.25, 'between': 0.5, 'ratio': 2.0}
    numbers = {'num_samples': 4, 'classes': [0, 1]}
    numbers |= {side: {'exit0': means, 'main': means | {'ratio': None}} for side in ('before', 'after')}
    matrices = {side: [torch.rand(4, 4), torch.rand(4, 4)] for side in ('before', 'after')}
    figure = draw_dissimilarity(numbers, matrices, '')
    panels = figure.axes[:4]
    assert [axes.get_title() for axes in panels[::3]] == [
        'exit0, before the FC layer\nwithin 0.25, between 0.50, ratio 2.0',
        'main, after the FC layer\nwithin 0.25, between 0.50',
    ]
    drawn = [torch.tensor(np.asarray(axes.get_images()[0].get_array())) for axes in panels]
    assert all(torch.equal(one, other) for one, other in zip(drawn, [*matrices['before'], *matrices['after']]))


def test_architecture_is_drawn_with_all_its_boxes(make_model):
    numbers = describe_architecture(make_model(exits=[1, 3]), (3, 64, 64))
    texts = [text.get_text() for text in draw_architecture(numbers, 'net').axes[0].texts]
    written = [text for text in texts if text]
    assert len(written) == 1 + 3 + 2 + 1
    assert written[0] == 'image\n3 x 64 x 64'
    assert written[-1] == 'main\n10 classes'
    assert any(text.startswith('exit1\nconv ') and text.endswith('MACs') for text in written)


def test_json_has_a_line_per_row_of_numbers_and_reads_back():
    content = {'a': [[1, -2.5e-06], [None, 3]], 'b': ['x [1,\n 2]', 1], 'c': [], 'd': [{'e': [1]}]}
    text = format_json(content)
    assert json.loads(text) == content
    assert '    [1, -2.5e-06],\n    [null, 3]\n' in text
    with pytest.raises(ValueError, match='not JSON compliant'):
        format_json({'a': math.nan})


# Runs


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Four runs of one data set, with two exits, three, two of which teach, and none; nobody changes them."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('runs')
    images = write_images(folder / 'images')
    for name, flags in RUNS.items():
        with script_state(folder):
            paths = ('--data-dir', str(images), '--output', str(folder / 'out'), '--experiment', name)
            assert train.main([*FLAGS.split(), *flags.split(), *paths]) == 0
    return folder


def analyse(folder, *argv, names=tuple(RUNS), cwd=None):
    """Run the program and return its code."""
    runs = [str(folder / 'out' / name) for name in names]
    with script_state(cwd or folder):
        return main([*runs, '-j', '0', '-b', '4', *map(str, argv)])


@pytest.fixture(scope='module')
def analysed(folder, tmp_path_factory):
    """What the program wrote for all four."""
    out = tmp_path_factory.mktemp('analysed') / 'a/b'
    assert analyse(folder, '--out', out, '--samples', '8') == 0
    return out


@pytest.fixture(scope='module')
def numbers(analysed):
    return json.loads((analysed / 'analysis.json').read_text())


@pytest.fixture
def undrawn(monkeypatch):
    """Leaves the pictures out, which take most of the time."""

    def refuse(figure):
        raise ImportError('matplotlib')

    monkeypatch.setattr('timm_multiexit.analysis.study.encode_png', refuse)


def fails(capsys, folder, *argv, **kwargs):
    """The one line that the program ends with."""
    capsys.readouterr()
    assert analyse(folder, *argv, **kwargs) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith('analysis: error: ')
    return error.removeprefix('analysis: error: ')


def test_every_figure_is_written_and_none_is_blank(analysed):
    exits = ('ce', 'eed', 'part')
    alone = {f'fig{figure}_{name}' for figure in ('1_architecture', '2_agreement', '4_dissimilarity') for name in exits}
    together = {'fig3_main_and_ensemble', 'fig5_training', 'table4_diversity', 'accuracy_over_macs'}
    paths = list(analysed.glob('*.png'))
    assert {path.stem for path in paths} == alone | together
    assert {path.name for path in analysed.iterdir()} == {path.name for path in paths} | {'analysis.json'}
    for path in paths:
        with Image.open(path, formats=['PNG']) as image:
            assert min(image.size) >= 450
            assert len(set(image.convert('L').tobytes())) > 10, path


def test_accuracy_is_that_of_the_runs_own_tables(folder, numbers):
    for name in RUNS:
        results = json.loads((folder / 'out' / name / 'results.json').read_text())
        rows = {row['exit']: row for row in results['rows']}
        found = numbers['runs'][name]
        own = {key.removeprefix('exit'): value for key, value in found['top1'].items()}
        assert own == pytest.approx({key: row['top-1'] for key, row in rows.items()}, abs=1e-3)
        for point in found['accuracy_over_macs']:
            row = rows[point['classifier'].removeprefix('exit')]
            assert point['sequential'] == pytest.approx(1e9 * row['GMACs sequential'])
            assert point['fixed'] == (row['GMACs fixed'] and pytest.approx(1e9 * row['GMACs fixed']))
        assert (found['num_samples'], found['best_epoch']) == (11, results['best_epoch'] + 1)


def test_curves_are_those_of_the_summaries(folder, numbers):
    for name in RUNS:
        with (folder / 'out' / name / 'summary.csv').open() as file:
            rows = list(csv.DictReader(file))
        curve = numbers['runs'][name]['curve']
        assert curve['main'] == pytest.approx([float(row['eval_top1']) for row in rows], abs=1e-5)
        assert curve['epochs'] == [int(row['epoch']) + 1 for row in rows]
    target = numbers['runs']['ce']['curve']['final_main']
    curve = numbers['runs']['eed']['curve']
    assert numbers['reference'] == 'ce'
    assert curve['epochs_to_keep'] == epochs_to_keep(curve['epochs'], curve['main'], target)


def test_runs_without_exits_have_curves_and_costs_alone(numbers):
    described = {
        'model',
        'method',
        'seed',
        'best_epoch',
        'curve_of',
        'curve',
        'num_samples',
        'top1',
        'accuracy_over_macs',
    }
    assert numbers['runs']['plain'].keys() == described
    others = {'architecture', 'agreement', 'diversity', 'dissimilarity'}
    assert numbers['runs']['eed'].keys() == described | others
    assert [run['method'] for run in numbers['runs'].values()] == ['ce', 'eed-kl', 'eed-mse-teacher[0,-1]', 'plain']


def test_numbers_are_those_of_the_network_on_the_images(folder, numbers):
    model = tme.create_model(f'local-dir:{folder}/out/eed/best', pretrained=True).eval()
    paths = sorted((folder / 'images/val').glob('*/*.jpg'))
    transform = create_transform(**resolve_data_config({}, model=model))
    images = torch.stack([transform(Image.open(path).convert('RGB')) for path in paths])
    targets = torch.tensor([['cat', 'dog'].index(path.parent.name) for path in paths])
    with torch.no_grad():
        outputs = model(images, exits=True)
    found = numbers['runs']['eed']
    expected = describe_agreement(outputs.logits, targets)
    assert np.allclose(found['agreement']['outcomes'], expected['outcomes'], atol=1e-5)
    assert found['agreement']['classifiers'] == ['exit0', 'exit1', 'exit2', 'main', 'ens']
    teacher = describe_members(outputs.logits, targets, dict.fromkeys(range(4), 0.25))
    assert found['diversity']['teacher'] == found['diversity']['all']
    assert found['diversity']['teacher']['softmax_variance'] == pytest.approx(teacher['softmax_variance'], abs=1e-4)
    # Eight of the eleven images, four of each class, which do not depend on the run.
    places = choose_samples(targets, 8)
    matrix = dissimilarity_matrix(outputs.features[-1][places])
    means = block_means(matrix, targets[places])
    assert found['dissimilarity']['before']['main']['within'] == pytest.approx(means['within'], abs=1e-3)
    assert found['dissimilarity']['num_samples'] == 8


def test_reference_gives_its_last_epoch_and_its_accuracy(tmp_path, monkeypatch, undrawn):
    values = {'ce': ([60.0, 50.0], {'main': 70.0, 'ens': 72.0}), 'eed': ([55.0, 58.0], {'main': 71.5, 'ens': 71.0})}
    runs = []
    for name, (curve, _) in values.items():
        rows = [{'epoch': idx, 'eval_top1': value} for idx, value in enumerate(curve)]
        args = Namespace(exits='auto', exit_loss=name, model='a', task='classification', val_split='v', train_split='t')
        runs.append(Run(name, tmp_path, args, rows, {}))

    def measure(self, run):
        return {'num_samples': 9, 'top1': values[run.name][1], 'diversity': {'teacher': None}}, {}

    monkeypatch.setattr('timm_multiexit.analysis.study.Measurer.measure', measure)
    args = Namespace(reference=None, dataset='torch/cifar10', split='test', samples=2, seed=0)
    found = Study(runs, args, tmp_path, None).run()['runs']['eed']
    assert found['diversity']['gain'] == {'main': 1.5, 'ens': -1.0}
    assert found['curve']['epochs_to_keep'] == 1  # 55 and 58 are above 50, and both below 60


def test_gains_are_over_the_reference(numbers):
    runs = numbers['runs']
    gain = runs['part']['diversity']['gain']
    assert gain['main'] == pytest.approx(runs['part']['top1']['main'] - runs['ce']['top1']['main'], abs=1e-5)
    assert gain['ens'] == pytest.approx(runs['part']['top1']['ens'] - runs['ce']['top1']['ens'], abs=1e-5)
    assert runs['ce']['diversity']['gain'] == {'main': 0, 'ens': 0}
    assert runs['ce']['diversity']['teacher'] is None
    assert runs['part']['diversity']['teacher']['members'] == ['exit0', 'main']


def test_no_path_of_this_machine_is_written(folder, analysed):
    text = (analysed / 'analysis.json').read_text()
    assert [word for word in (str(folder), str(analysed.parents[1]), '/tmp/', '/work') if word in text] == []


def test_without_matplotlib_numbers_are_written(folder, tmp_path, monkeypatch, caplog, numbers):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith('matplotlib'):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, '__import__', refuse)
    assert analyse(folder, '--out', tmp_path, '--samples', '8', names=('eed', 'ce')) == 0
    assert [path.name for path in tmp_path.iterdir()] == ['analysis.json']
    assert [record.message for record in caplog.records if 'matplotlib' in record.message] == [
        'Only numbers are written: matplotlib is not installed: pip install "timm-multiexit[plots]".'
    ]
    assert json.loads((tmp_path / 'analysis.json').read_text())['runs']['eed'] == numbers['runs']['eed']


def test_numbers_of_a_run_do_not_depend_on_the_others(folder, tmp_path, numbers, undrawn):
    assert analyse(folder, '--out', tmp_path, '--samples', '8', '--reference', 'eed-kl', names=('eed',)) == 0
    alone = json.loads((tmp_path / 'analysis.json').read_text())
    assert alone['reference'] == 'eed'
    assert alone['runs']['eed']['dissimilarity'] == numbers['runs']['eed']['dissimilarity']


def test_reference_is_named_by_run_or_method(folder):
    runs = read_runs([folder / 'out' / name for name in RUNS])
    assert find_reference(runs, None).name == 'ce'
    assert find_reference(runs, 'part').name == 'part'
    assert find_reference(runs, 'eed-kl').name == 'eed'
    assert find_reference(runs[1:], None) is None
    with pytest.raises(tme.MultiExitError, match=r"--reference is 'byot', allowed are the runs ce \(ce\), eed"):
        find_reference(runs, 'byot')


def test_runs_are_named_by_what_tells_them_apart():
    assert name_folders([Path('/a/b/c')]) == ['c']
    assert name_folders([Path('/a/x/c'), Path('/b/x/c'), Path('/a/x/d')]) == ['a/x/c', 'b/x/c', 'a/x/d']


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['--split', 'test'], "has no split 'test', allowed are train, val."),
        (['--data-dir', 'nothing'], "There is no data folder 'nothing'"),
        (['--samples', '1'], '--samples must be >= 2, got 1.'),
        (['--reference', 'byot'], "--reference is 'byot'"),
    ],
    ids=['split', 'folder', 'samples', 'reference'],
)
def test_what_cannot_be_done_is_said_in_one_line(argv, message, folder, tmp_path, capsys):
    assert message in fails(capsys, folder, '--out', tmp_path, *argv, names=('ce',))


def test_data_of_other_classes_is_refused(folder, tmp_path, capsys):
    images = shutil.copytree(folder / 'images', tmp_path / 'images')
    shutil.copytree(images / 'val/dog', images / 'val/eel')
    message = fails(capsys, folder, '--data-dir', images, '--out', tmp_path, names=('plain',))
    assert message.startswith('plain has 2 classes, and the validation split has others')


def test_folder_that_is_no_run_is_refused(folder, tmp_path, capsys):
    assert 'it has no args.yaml' in fails(capsys, folder, names=('..',))
    assert 'is named twice' in fails(capsys, folder, names=('ce', 'ce'))
    run = shutil.copytree(folder / 'out/ce', tmp_path / 'out/run', ignore=shutil.ignore_patterns('*.pth.tar'))
    (run / 'args.yaml').write_text('- 1\n')
    assert 'is not an args.yaml of train.py' in fails(capsys, tmp_path, names=('run',), cwd=folder)
    shutil.rmtree(run / 'best')
    assert 'it has no best/config.json' in fails(capsys, tmp_path, names=('run',), cwd=folder)


def test_other_accuracy_than_the_runs_own_is_warned_of(folder, tmp_path, caplog, undrawn):
    run = shutil.copytree(folder / 'out/plain', tmp_path / 'out/run', ignore=shutil.ignore_patterns('*.pth.tar'))
    results = json.loads((run / 'results.json').read_text())
    results['rows'][-1]['top-1'] -= 5
    (run / 'results.json').write_text(json.dumps(results))
    assert analyse(tmp_path, '--out', tmp_path / 'a', names=('run',), cwd=folder) == 0
    assert [record.message for record in caplog.records if 'run reported' in record.message]


@pytest.mark.parametrize(
    ('argv', 'own', 'expected'),
    [
        ([], {}, ('digits', None, 'test')),
        (['--data-dir', 'a'], {}, ('', 'a', 'test')),
        (['--data-dir', 'a', '--dataset', 'torch/cifar10'], {}, ('torch/cifar10', 'a', 'test')),
        (
            ['--split', 'train'],
            {'is_demo': False, 'dataset': 'torch/cifar10', 'data_dir': 'b'},
            ('torch/cifar10', 'b', 'train'),
        ),
        (
            ['--data-dir', 'a'],
            {'is_demo': False, 'dataset': 'torch/cifar10', 'data_dir': 'b'},
            ('torch/cifar10', 'a', 'test'),
        ),
        ([], {'test_split': None}, ('digits', None, 'validation')),
    ],
    ids=['run', 'folder-for-demo', 'both', 'split', 'moved', 'no-test'],
)
def test_data_is_the_runs_where_flags_do_not_say(argv, own, expected):
    args = {'is_demo': True, 'dataset': 'digits', 'data_dir': None, 'test_split': 'test', 'val_split': 'validation'}
    run = Run('a', Path('a'), Namespace(**args | own), [], {})
    completed = complete_args(create_analyze_parser().parse_args(['a', *argv]), run)
    assert (completed.dataset, completed.data_dir, completed.split) == expected


def test_runs_without_any_split_need_one_named():
    run = Run('a', Path('a'), Namespace(data_dir='a', dataset='', test_split=None, val_split=''), [], {})
    with pytest.raises(tme.MultiExitError, match='name one with --split'):
        complete_args(create_analyze_parser().parse_args(['a']), run)


def test_what_epochs_were_evaluated_on_is_said():
    args = {'val_split': 'validation', 'train_split': 'train'}
    runs = [Run('a', Path('a'), Namespace(**args, val_from_train=number), [], {}) for number in (None, 50)]
    assert [run.curve_split for run in runs] == ['validation', '50 images held out of train']


def test_runs_of_several_labels_have_curves_alone(folder, tmp_path):
    run = shutil.copytree(folder / 'out/ce', tmp_path / 'out/run', ignore=shutil.ignore_patterns('*.pth.tar'))
    args = yaml.safe_load((run / 'args.yaml').read_text())
    (run / 'args.yaml').write_text(yaml.safe_dump(args | {'task': 'multilabel'}))
    text = (run / 'summary.csv').read_text().replace('top1', 'map')
    (run / 'summary.csv').write_text(text)
    assert analyse(tmp_path, '--out', tmp_path / 'a', names=('run',), cwd=folder) == 0
    found = json.loads((tmp_path / 'a/analysis.json').read_text())
    assert found['metric'] == 'map'
    assert len(found['runs']['run']['curve']['main']) == 3
    assert {path.stem for path in (tmp_path / 'a').glob('*.png')} == {'fig3_main_and_ensemble', 'fig5_training'}
    mixed = read_runs([run, folder / 'out/ce'])
    with pytest.raises(tme.MultiExitError, match='cannot be compared'):
        Study(mixed, Namespace(reference=None), tmp_path, None)
