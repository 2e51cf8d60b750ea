"""Accuracy, calibration and the tables they are shown in."""

import math
import multiprocessing

import pytest
import torch
import torch.distributed as dist
from sklearn.metrics import average_precision_score, f1_score

from timm_multiexit.evaluation.metrics import (
    ConfidenceBins,
    ExitEvaluator,
    default_metric,
    evaluation_columns,
    flatten_metrics,
)
from timm_multiexit.utils.errors import MultiExitError

BATCHES = (7, 1, 16, 5)  # samples, uneven


def test_of_equal_logits_the_first_answers_as_where_policies_do():
    logits = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [1.0, 1.0, 1.0]]).repeat(40, 1)
    target = torch.tensor([0, 2, 0]).repeat(40)
    evaluator = ExitEvaluator(0)
    evaluator.update([logits], target)
    assert evaluator.compute()['main']['top1'] == pytest.approx(100 * 2 / 3)


def to_logits(*confidences):
    """Return two-class logits whose first class has these probabilities."""
    return torch.tensor([[math.log(p), math.log(1 - p)] for p in confidences])


def softmax_loop(row):
    top = max(row)
    exps = [math.exp(value - top) for value in row]
    return [value / sum(exps) for value in exps]


def ece_loop(logits, target, num_bins):
    """Guo et al., equation 3, sample by sample and bin by bin."""
    samples = []
    for row, label in zip(logits.tolist(), target.tolist()):
        probs = softmax_loop(row)
        samples.append((max(probs), probs.index(max(probs)) == label))
    gap = 0.0
    for idx in range(num_bins):
        inside = [(conf, hit) for conf, hit in samples if idx / num_bins < conf <= (idx + 1) / num_bins]
        if inside:
            confidence = sum(conf for conf, _ in inside) / len(inside)
            accuracy = sum(hit for _, hit in inside) / len(inside)
            gap += len(inside) / len(samples) * abs(accuracy - confidence)
    return 100 * gap


def metrics_loop(logits, target):
    """Loss, top-1 and top-5 in percent, sample by sample."""
    loss, top1, top5 = 0.0, 0, 0
    for row, label in zip(logits.tolist(), target.tolist()):
        loss -= math.log(softmax_loop(row)[label])
        ranked = sorted(range(len(row)), key=lambda idx: -row[idx])
        top1 += label == ranked[0]
        top5 += label in ranked[:5]
    return {'loss': loss / len(target), 'top1': 100 * top1 / len(target), 'top5': 100 * top5 / len(target)}


@pytest.mark.parametrize('num_bins', [1, 10, 15])
def test_calibration_error_equals_a_loop_over_samples_and_bins(num_bins):
    logits, target = torch.randn(400, 6) * 2, torch.randint(6, (400,))
    meter = ConfidenceBins(num_bins)
    for part in (slice(0, 150), slice(150, 151), slice(151, 400)):
        meter.update(logits[part], target[part])
    expected = ece_loop(logits, target, num_bins)
    assert expected > 5
    assert meter.compute_ece() == pytest.approx(expected, abs=1e-4)


def test_calibration_error_of_four_samples_worked_by_hand():
    # Ten bins. 0.95 twice, right once: gap 0.45. 0.65 twice, right twice: gap 0.35. Half of the samples each: 0.40.
    meter = ConfidenceBins(10)
    meter.update(to_logits(0.95, 0.95, 0.65, 0.65), torch.tensor([0, 1, 0, 0]))
    assert meter.compute_ece() == pytest.approx(40.0, abs=1e-4)


def test_confidence_on_a_bin_edge_belongs_to_the_lower_bin():
    # Two bins. 0.5, wrong, in the first: gap 0.5. 0.75, right, in the second: gap 0.25. Together it were 12.5 %.
    meter = ConfidenceBins(2)
    meter.update(torch.cat([torch.zeros(1, 2), to_logits(0.75)]), torch.tensor([1, 0]))
    assert meter.compute_ece() == pytest.approx(37.5, abs=1e-4)


def test_full_confidence_is_in_the_last_bin():
    # 1.0 wrong and 0.99 right share the last of 15 bins: |1.99 - 1| / 2.
    meter = ConfidenceBins(15)
    meter.update(torch.cat([torch.tensor([[100.0, 0.0]]), to_logits(0.99)]), torch.tensor([1, 0]))
    assert meter.compute_ece() == pytest.approx(49.5, abs=1e-4)


def test_calibration_error_without_samples_is_zero():
    assert ConfidenceBins().compute_ece() == 0.0


@pytest.fixture
def predictions():
    """Return logits of two exits and main that are right more often the deeper, and targets."""
    target = torch.randint(10, (sum(BATCHES),))
    hint = torch.nn.functional.one_hot(target, 10)
    return [torch.randn(sum(BATCHES), 10) + strength * hint for strength in (0.5, 1.0, 2.0)], target


def evaluate(predictions, num_classifiers=3, **kwargs):
    logits, target = predictions
    evaluator = ExitEvaluator(num_classifiers - 1, **kwargs)
    start = 0
    for count in BATCHES:
        part = slice(start, start + count)
        evaluator.update([single[part] for single in logits], target[part])
        start += count
    return evaluator


def test_evaluator_equals_plain_loops_for_each_classifier_and_their_ensemble(predictions):
    logits, target = predictions
    metrics = evaluate(predictions).compute()
    ensemble = sum(single.double() for single in logits) / 3
    sources = dict(zip(('exit0', 'exit1', 'main', 'ens'), (*logits, ensemble)))
    assert list(metrics) == list(sources)
    for name, single in sources.items():
        expected = metrics_loop(single, target) | {'ece': ece_loop(single, target, 15)}
        assert dict(metrics[name]) == pytest.approx(expected, abs=1e-4), name
    assert len({round(values['loss'], 6) for values in metrics.values()}) == 4
    assert all(0 < values['top1'] < values['top5'] < 100 for name, values in metrics.items() if name != 'ens')


@pytest.mark.parametrize('limit', [3, 7, 20, 28])
def test_max_samples_cuts_the_padding_off(predictions, limit):
    logits, target = predictions
    evaluator = evaluate(predictions, max_samples=limit)
    metrics = evaluator.compute()
    assert evaluator.num_samples == limit
    for name, single in zip(('exit0', 'exit1', 'main'), logits):
        expected = metrics_loop(single[:limit], target[:limit]) | {'ece': ece_loop(single[:limit], target[:limit], 15)}
        assert dict(metrics[name]) == pytest.approx(expected, abs=1e-4), name


def test_max_samples_above_the_number_of_samples_cuts_nothing(predictions):
    assert evaluate(predictions, max_samples=1000).compute() == evaluate(predictions).compute()


def test_evaluator_takes_half_precision_logits(predictions):
    logits, target = predictions
    rounded = [single.bfloat16() for single in logits]
    metrics = evaluate((rounded, target)).compute()
    ensemble = sum(single.double() for single in rounded) / 3
    assert metrics['main']['loss'] == pytest.approx(metrics_loop(rounded[-1].double(), target)['loss'], abs=1e-4)
    assert metrics['ens']['loss'] == pytest.approx(metrics_loop(ensemble, target)['loss'], abs=1e-4)


@pytest.fixture
def labelled():
    """Return logits of an exit and main, and the labels [B, C] of samples that have none to several of five."""
    target = (torch.rand(sum(BATCHES), 5) < 0.3).float()
    return [torch.randn(sum(BATCHES), 5) + strength * (2 * target - 1) for strength in (0.3, 1.0)], target


def multi_label_reference(logits, target, threshold):
    """BCE by its formula, the rest by scikit-learn, in percent."""
    probs = logits.double().sigmoid()
    loss = -(target * probs.log() + (1 - target) * (1 - probs).log()).mean()
    labels, predicted = target.int().numpy(), (probs >= threshold).int().numpy()
    f1 = {
        f'{kind.removesuffix("s")}_f1': 100 * f1_score(labels, predicted, average=kind, zero_division=0)
        for kind in ('micro', 'macro', 'samples')
    }
    precision = average_precision_score(labels, logits.numpy(), average='macro')
    return {'loss': float(loss), 'map': 100 * precision, **f1}


@pytest.mark.parametrize(('threshold', 'limit'), [(0.5, None), (0.8, None), (0.5, 20)])
def test_multi_label_metrics_equal_scikit_learn_for_each_classifier_and_the_ensemble(labelled, threshold, limit):
    logits, target = labelled
    metrics = evaluate(labelled, 2, multi_label=True, threshold=threshold, max_samples=limit).compute()
    sources = {'exit0': logits[0], 'main': logits[1], 'ens': (logits[0] + logits[1]) / 2}
    assert list(metrics) == list(sources)
    for name, single in sources.items():
        expected = multi_label_reference(single[:limit], target[:limit], threshold)
        assert dict(metrics[name]) == pytest.approx(expected, abs=1e-4), name
    assert len({round(values['map'], 6) for values in metrics.values()}) == 3


def evaluate_share(rank, path, predictions, multi_label, results):
    """Measure every second sample, after which a sampler's padding repeats the first."""
    dist.init_process_group('gloo', init_method=f'file://{path}', rank=rank, world_size=2)
    logits, target = predictions
    places = list(range(rank, len(target), 2))
    evaluator = ExitEvaluator(len(logits) - 1, max_samples=len(places), multi_label=multi_label)
    places += [0]
    evaluator.update([single[places] for single in logits], target[places])
    results.put((rank, evaluator.compute(distributed=True)))
    dist.destroy_process_group()


@pytest.mark.skipif('fork' not in multiprocessing.get_all_start_methods(), reason='starts its ranks by fork')
@pytest.mark.parametrize('multi_label', [False, True], ids=['single-label', 'multi-label'])
def test_two_ranks_with_uneven_shares_measure_what_one_process_does(tmp_path, predictions, labelled, multi_label):
    given = labelled if multi_label else predictions
    context = multiprocessing.get_context('fork')
    results = context.SimpleQueue()
    args = [(rank, tmp_path / 'store', given, multi_label, results) for rank in (0, 1)]
    ranks = [context.Process(target=evaluate_share, args=each) for each in args]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(30)
        assert rank.exitcode == 0
    expected = evaluate(given, len(given[0]), multi_label=multi_label).compute()
    for _ in ranks:
        _, metrics = results.get()
        assert {name: pytest.approx(values, abs=1e-4) for name, values in metrics.items()} == expected


@pytest.mark.parametrize('threshold', [0, 1, -0.5, float('nan')])
def test_threshold_out_of_range_is_refused(threshold):
    with pytest.raises(MultiExitError, match=rf'threshold must be in \(0, 1\), got {threshold}'):
        ExitEvaluator(1, multi_label=True, threshold=threshold)


@pytest.mark.parametrize(
    ('multi_label', 'shape', 'message'),
    [
        (False, (4, 10), r'single-label evaluation must have shape \[4\] for logits of shape \[4, 10\], got \[4, 10\]'),
        (True, (4,), r'multi-label evaluation must have shape \[4, 10\] for logits of shape \[4, 10\], got \[4\]'),
        (True, (4, 9), r'multi-label .* got \[4, 9\]'),
    ],
)
def test_targets_of_the_other_kind_are_refused(multi_label, shape, message):
    evaluator = ExitEvaluator(0, multi_label=multi_label)
    with pytest.raises(MultiExitError, match=message):
        evaluator.update([torch.zeros(4, 10)], torch.zeros(shape, dtype=torch.long))


def test_flattened_metrics_begin_with_main_under_timm_names():
    metrics = {
        'exit0': {'loss': 3.0, 'top1': 10.0},
        'main': {'loss': 1.0, 'top1': 30.0},
        'ens': {'loss': 2.5, 'top1': 35.0},
    }
    assert list(flatten_metrics(metrics).items()) == [
        ('loss', 1.0),
        ('top1', 30.0),
        ('exit0_loss', 3.0),
        ('exit0_top1', 10.0),
        ('ens_loss', 2.5),
        ('ens_top1', 35.0),
        ('mean_loss', 2.0),  # of exit0 and main, without the ensemble
        ('mean_top1', 20.0),
    ]
    assert metrics['main'] == {'loss': 1.0, 'top1': 30.0}


def test_plain_model_has_the_columns_of_timm_and_no_mean():
    assert list(flatten_metrics({'main': {'loss': 1.0, 'top1': 30.0}})) == ['loss', 'top1']


@pytest.mark.parametrize(
    ('multi_label', 'keys'),
    [(False, ('loss', 'top1', 'top5', 'ece')), (True, ('loss', 'map', 'micro_f1', 'macro_f1', 'sample_f1'))],
)
def test_columns_hold_every_metric_of_main_exits_ensemble_and_mean(multi_label, keys):
    prefixes = ('', 'exit0_', 'exit1_', 'ens_', 'mean_')
    columns = evaluation_columns(2, multi_label=multi_label)
    assert columns == tuple(prefix + key for prefix in prefixes for key in keys)
    assert default_metric(multi_label) == ExitEvaluator(2, multi_label=multi_label).default_metric
    assert default_metric(multi_label) in columns
