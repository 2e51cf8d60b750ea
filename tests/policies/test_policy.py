"""Policies: what leaves where, against a slow oracle that looks at one sample at a time, and against hand-worked cases."""

import itertools
import json
import math

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from timm_multiexit.policies.leaving import PolicyRun, apply_policy, check_logits, walk
from timm_multiexit.policies.policy import COMBINATIONS, CRITERIA, ExitPolicy, Prediction
from timm_multiexit.utils.errors import MultiExitError

NUM_EXITS = 4
TEMPERATURES = (0.5, 2.0, 1.0, 3.0, 0.7)
INF = math.inf


# The oracle: lists of floats, one sample at a time


def softmax(logits):
    exps = [math.exp(logit - max(logits)) for logit in logits]
    return [value / sum(exps) for value in exps]


def combine(seen, how):
    """Return what a list of logits (of one sample, by exit) answers together."""
    if how is None:
        return seen[-1]
    if how == 'geometric':
        seen = [[math.log(share) if share else -INF for share in softmax(logits)] for logits in seen]
    return [sum(column) / len(seen) for column in zip(*seen)]


def score(criterion, answers):
    """Return the score of the last answer of one sample; `answers` are those of the used exits so far."""
    shares = sorted(softmax(answers[-1]), reverse=True)
    if criterion == 'confidence':
        return shares[0]
    if criterion == 'margin':
        return shares[0] - shares[1]
    if criterion == 'entropy':
        return min(1.0, -sum(share * math.log(share) for share in shares if share) / math.log(len(shares)))
    classes = [answer.index(max(answer)) for answer in answers]
    streak = 0
    for before, after in itertools.pairwise(classes):
        streak = streak + 1 if before == after else 0
    return streak


def decide(policy, logits):
    """Return (exit, answer) of one sample; `logits` is one list per classifier, main last."""
    seen, answers = [], []
    for idx, single in enumerate(logits):
        is_main = idx == len(logits) - 1
        if not is_main and policy.thresholds[idx] is None:
            continue
        temperature = policy.temperatures[idx] if policy.temperatures else 1.0
        seen.append([logit / temperature for logit in single])
        answers.append(combine(seen, policy.combine))
        if is_main:
            return idx, answers[-1]
        value = score(policy.criterion, answers)
        if value <= policy.thresholds[idx] if policy.criterion == 'entropy' else value >= policy.thresholds[idx]:
            return idx, answers[-1]


def make_logits(num_samples=60, num_classes=4, num_classifiers=NUM_EXITS + 1, dtype=torch.float64):
    """Logits of classifiers that agree more or less and are more sure the deeper they are."""
    common = torch.randn(num_samples, num_classes, dtype=torch.float64)
    logits = [
        (common + torch.randn(num_samples, num_classes, dtype=torch.float64)) * (1 + idx)
        for idx in range(num_classifiers)
    ]
    return [single.to(dtype) for single in logits]


def policies(criterion):
    """Thresholds under which samples leave at every classifier, some of them with an exit that is not used."""
    if criterion == 'patience':
        return [(1, 1, 1, 1), (2, 2, 2, 2), (1, 2, 3, 1), (1, None, 1, 1), (None, 1, 1.0, None), (9, 9, 9, 9)]
    mid = {'confidence': 0.8, 'margin': 0.5, 'entropy': 0.4}[criterion]
    return [(mid,) * 4, (mid, None, mid, mid), (None, mid, None, mid), (0.9, 0.7, 0.3, 0.1), (None,) * 4]


CASES = [
    (criterion, thresholds, temperatures, how)
    for criterion in CRITERIA
    for thresholds in policies(criterion)
    for temperatures in ((), TEMPERATURES)
    for how in (None, *COMBINATIONS)
]


@pytest.mark.parametrize(('criterion', 'thresholds', 'temperatures', 'how'), CASES)
def test_policy_decides_as_the_oracle_does_sample_by_sample(criterion, thresholds, temperatures, how):
    policy = ExitPolicy(criterion, thresholds, temperatures, how)
    logits = make_logits()
    prediction = apply_policy(policy, logits)
    expected = [decide(policy, rows) for rows in zip(*(single.tolist() for single in logits))]
    assert prediction.exit_idx.tolist() == [idx for idx, _ in expected]
    answers = torch.tensor([answer for _, answer in expected], dtype=torch.float64)
    torch.testing.assert_close(prediction.logits, answers, rtol=1e-12, atol=1e-12)


def test_cases_are_all_combinations_and_samples_leave_everywhere():
    assert len(CASES) == (5 + 5 + 5 + 6) * 2 * 3
    logits = make_logits()
    for criterion in CRITERIA:
        seen = set()
        for thresholds in policies(criterion):
            seen |= set(apply_policy(ExitPolicy(criterion, thresholds), logits).exit_idx.tolist())
        assert seen == set(range(1 if criterion == 'patience' else 0, 5)), criterion  # one exit alone is no agreement


@pytest.mark.parametrize('how', [None, *COMBINATIONS])
@pytest.mark.parametrize('criterion', CRITERIA)
def test_walk_gives_answers_and_scores_of_the_used_exits_then_main(criterion, how):
    policy = ExitPolicy(criterion, policies(criterion)[3], TEMPERATURES, how)
    logits = make_logits(num_samples=7)
    steps = list(walk(policy, logits))
    assert [idx for idx, _, _ in steps] == [*policy.used, NUM_EXITS]
    assert steps[-1][2] is None
    for row in range(7):
        seen, answers = [], []
        for idx, answer, scores in steps:
            seen.append([logit / TEMPERATURES[idx] for logit in logits[idx][row].tolist()])
            answers.append(combine(seen, how))
            assert answer[row].tolist() == pytest.approx(answers[-1], rel=1e-12)
            if scores is not None:
                assert float(scores[row]) == pytest.approx(score(criterion, answers), rel=1e-9, abs=1e-12)


# Worked by hand


def test_scores_are_those_worked_by_hand():
    # Odds of 8 : 1 : 1, so shares of 0.8, 0.1, 0.1.
    answer = torch.tensor([[8.0, 1.0, 1.0]], dtype=torch.float64).log()
    expected = {
        'confidence': 0.8,
        'margin': 0.7,
        'entropy': -(0.8 * math.log(0.8) + 0.2 * math.log(0.1)) / math.log(3),
    }
    for criterion, value in expected.items():
        assert float(PolicyRun(ExitPolicy(criterion)).score(answer)) == pytest.approx(value, rel=1e-12)


def test_patience_counts_exits_that_agree_with_the_one_before_without_a_break():
    one, two = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    run = PolicyRun(ExitPolicy('patience', (9,) * 6))
    answers = [one, one, two, two, two, one]
    assert [float(run.score(answer)) for answer in answers] == [0, 1, 0, 1, 2, 0]


def test_patience_leaves_at_the_exit_that_completes_the_streak():
    # Classes by exit and main; with a patience of 2 the third of three that agree answers.
    classes = torch.tensor([[0, 0, 0, 1], [0, 1, 1, 1], [0, 1, 0, 1], [1, 1, 0, 0]])
    logits = [5.0 * torch.nn.functional.one_hot(column, 2).double() for column in classes.T]
    assert apply_policy(ExitPolicy('patience', (1, 1, 1)), logits).exit_idx.tolist() == [1, 2, 3, 1]
    assert apply_policy(ExitPolicy('patience', (2, 2, 2)), logits).exit_idx.tolist() == [2, 3, 3, 3]
    # An exit that is not used is no break: the first and the third agree or do not.
    assert apply_policy(ExitPolicy('patience', (1, None, 1)), logits).exit_idx.tolist() == [2, 3, 2, 3]


def test_combinations_are_those_worked_by_hand():
    # Exit: odds 4 : 1. Main, at temperature 2: odds 1 : 16, with temperature 1 : 4.
    logits = [torch.tensor([[4.0, 1.0]]).log().double(), torch.tensor([[1.0, 16.0]]).log().double()]
    answers = {
        how: apply_policy(ExitPolicy('confidence', (0.9,), (1.0, 2.0), how), logits).logits[0].tolist()
        for how in (None, *COMBINATIONS)
    }
    log = math.log
    assert answers[None] == pytest.approx([0, log(4)])
    assert answers['mean'] == pytest.approx([log(4) / 2, log(4) / 2])
    # Shares 0.8, 0.2 and 0.2, 0.8; the geometric mean of each class is 0.4.
    assert answers['geometric'] == pytest.approx([log(0.4), log(0.4)])


def test_geometric_answer_has_the_normalized_geometric_mean_as_its_probabilities():
    logits = make_logits(num_samples=5)
    answer = apply_policy(ExitPolicy('confidence', (1.0,) * 4, (), 'geometric'), logits).logits
    shares = torch.stack([single.softmax(-1) for single in logits]).prod(0) ** (1 / 5)
    torch.testing.assert_close(answer.softmax(-1), shares / shares.sum(-1, keepdim=True), rtol=1e-12, atol=1e-12)


def test_exit_that_is_not_used_is_neither_run_nor_combined():
    logits = make_logits()
    others = [logits[0], logits[1] * -3 + 1, *logits[2:]]
    for how in (None, *COMBINATIONS):
        policy = ExitPolicy('confidence', (0.8, None, 0.8, None), TEMPERATURES, how)
        assert policy.used == (0, 2)
        first, second = apply_policy(policy, logits), apply_policy(policy, others)
        assert torch.equal(first.logits, second.logits)
        assert torch.equal(first.exit_idx, second.exit_idx)
        assert not set(first.exit_idx.tolist()) & {1, 3}


@pytest.mark.parametrize('how', [None, *COMBINATIONS])
@pytest.mark.parametrize('criterion', CRITERIA)
def test_without_used_exits_main_answers_alone(criterion, how):
    logits = make_logits()
    prediction = apply_policy(ExitPolicy(criterion, (None,) * 4, (), how), logits)
    expected = logits[-1].log_softmax(-1) if how == 'geometric' else logits[-1]
    torch.testing.assert_close(prediction.logits, expected)
    assert prediction.exit_idx.tolist() == [4] * 60


# Ties and ends of the range


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('criterion', CRITERIA)
def test_score_that_equals_the_threshold_leaves(criterion, dtype):
    logits = make_logits(num_classifiers=3, dtype=dtype)
    _, first, _ = list(walk(ExitPolicy(criterion, (1, 1)), logits))
    step = first if criterion == 'patience' else list(walk(ExitPolicy(criterion, (0.5, 0.5)), logits))[1]
    scores = step[2]
    for row in range(10):
        # Through JSON, as a threshold that was found on these scores travels.
        value = json.loads(json.dumps(float(scores[row])))
        if criterion == 'patience' and value < 1:
            continue
        prediction = apply_policy(ExitPolicy(criterion, (None if criterion != 'patience' else 1000, value)), logits)
        assert prediction.exit_idx[row] == 1
        is_past = scores >= scores[row] if criterion != 'entropy' else scores <= scores[row]
        assert torch.equal(prediction.exit_idx == 1, is_past)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(('criterion', 'all_leave'), [('confidence', 0.0), ('margin', 0.0), ('entropy', 1.0)])
def test_loosest_threshold_lets_everything_leave_even_equal_logits(criterion, all_leave, dtype):
    for num_classes in range(2, 130):
        logits = [torch.cat([torch.zeros(1, num_classes), torch.randn(2, num_classes)]).to(dtype)] * 2
        assert apply_policy(ExitPolicy(criterion, (all_leave,)), logits).exit_idx.tolist() == [0, 0, 0]


@pytest.mark.parametrize(('criterion', 'strictest'), [('confidence', 1.0), ('margin', 1.0), ('entropy', 0.0)])
def test_strictest_threshold_lets_only_a_certain_sample_leave(criterion, strictest):
    logits = [torch.tensor([[500.0, 0.0, 0.0], [3.0, 0.0, 0.0], [0.0, 0.0, 0.0]])] * 2
    assert apply_policy(ExitPolicy(criterion, (strictest,)), logits).exit_idx.tolist() == [0, 1, 1]


@pytest.mark.parametrize('how', [None, *COMBINATIONS])
@pytest.mark.parametrize('criterion', CRITERIA)
def test_class_that_is_masked_out_by_minus_infinity_changes_nothing_for_the_others(criterion, how):
    logits = make_logits(num_classes=3)
    masked = [torch.cat([single, torch.full((60, 1), -INF)], 1).double() for single in logits]
    policy = ExitPolicy(criterion, policies(criterion)[3], TEMPERATURES, how)
    if criterion == 'entropy':  # a share of the largest, log C
        thresholds = [value and value * math.log(3) / math.log(4) for value in policy.thresholds]
        expected = apply_policy(policy, logits)
        prediction = apply_policy(ExitPolicy(criterion, thresholds, TEMPERATURES, how), masked)
    else:
        expected, prediction = apply_policy(policy, logits), apply_policy(policy, masked)
    assert torch.equal(prediction.exit_idx, expected.exit_idx)
    torch.testing.assert_close(prediction.logits[:, :3], expected.logits)
    assert (prediction.logits[:, 3] == -INF).all()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_judged_in_float32(dtype):
    logits = make_logits(dtype=dtype)
    policy = ExitPolicy('confidence', (0.8,) * 4, TEMPERATURES, 'mean')
    prediction, expected = apply_policy(policy, logits), apply_policy(policy, [single.float() for single in logits])
    assert prediction.logits.dtype == torch.float32
    assert torch.equal(prediction.logits, expected.logits)
    assert torch.equal(prediction.exit_idx, expected.exit_idx)
    assert prediction.exit_idx.dtype == torch.int64


def test_logits_stay_as_they_are():
    logits = make_logits()
    before = [single.clone() for single in logits]
    for how in (None, *COMBINATIONS):
        apply_policy(ExitPolicy('confidence', (0.7,) * 4, TEMPERATURES, how), logits).logits.fill_(0)
    assert all(torch.equal(*pair) for pair in zip(logits, before))


# Samples leave the batch in the middle


@pytest.mark.parametrize('temperatures', [(), TEMPERATURES], ids=['plain', 'temperatures'])
@pytest.mark.parametrize('how', [None, *COMBINATIONS])
@pytest.mark.parametrize('criterion', CRITERIA)
def test_going_on_with_some_samples_gives_what_the_whole_batch_gives(criterion, how, temperatures):
    policy = ExitPolicy(criterion, policies(criterion)[3 if criterion == 'patience' else 1], temperatures, how)
    logits = make_logits()
    run = PolicyRun(policy)
    rows = torch.arange(60)
    for idx, answer, scores in walk(policy, logits):
        part = run.answer(idx, logits[idx][rows])
        torch.testing.assert_close(part, answer[rows], rtol=1e-12, atol=1e-12)
        if scores is not None:
            torch.testing.assert_close(run.score(part), scores[rows], rtol=1e-12, atol=1e-12)
            # A third leaves, the others go on in another order, one of them twice.
            chosen = torch.randperm(len(rows))[: max(2, 2 * len(rows) // 3)]
            chosen = torch.cat([chosen, chosen[:1]])
            run.select(chosen)
            rows = rows[chosen]
    assert 2 < len(rows) < 60


def test_a_run_may_be_left_with_no_sample():
    logits = make_logits()
    run = PolicyRun(ExitPolicy('patience', (1, 1, 1, 1), TEMPERATURES, 'geometric'))
    run.score(run.answer(0, logits[0]))
    run.select(torch.tensor([], dtype=torch.int64))
    answer = run.answer(1, logits[1][:0])
    assert answer.shape == (0, 4)
    assert run.score(answer).shape == (0,)


@pytest.mark.parametrize('criterion', CRITERIA)
def test_score_of_nan_is_nan_for_that_sample_alone(criterion):
    logits = make_logits(num_samples=3)
    logits[1][1, 2] = math.nan
    run = PolicyRun(ExitPolicy(criterion, policies(criterion)[0]))
    for idx in range(2):
        scores = run.score(run.answer(idx, logits[idx]))
    assert scores.isnan().tolist() == [False, True, False]


# What is refused, each in one line

BAD_POLICIES = {
    'criterion': (
        dict(criterion='certainty'),
        "criterion must be one of confidence, entropy, margin, patience, got 'certainty'",
    ),
    'criterion-none': (dict(criterion=None), 'criterion .* got None'),
    'criterion-list': (dict(criterion=['confidence']), r"criterion .* got \['confidence'\]"),
    'combine': (dict(combine='sum'), "combine must be None, mean or geometric, got 'sum'"),
    'combine-dict': (dict(combine={}), r'combine .* got \{\}'),
    'thresholds-number': (dict(thresholds=0.5), 'thresholds must be a sequence of numbers, got 0.5'),
    'thresholds-text': (dict(thresholds='0.5'), "thresholds must be .* got '0.5'"),
    'thresholds-none': (dict(thresholds=None), 'thresholds must be .* got None'),
    'threshold-high': (dict(thresholds=(0.5, 1.1)), r'threshold of .* must be in \[0, 1\], .* got 1.1'),
    'threshold-low': (dict(thresholds=(-0.1,)), 'threshold .* got -0.1'),
    'threshold-nan': (dict(thresholds=(math.nan,)), 'threshold .* got nan'),
    'threshold-inf': (dict(thresholds=(INF,)), 'threshold .* got inf'),
    'threshold-huge': (dict(thresholds=(10**400,)), 'threshold .* got 1000'),
    'threshold-bool': (dict(thresholds=(True,)), 'threshold .* got True'),
    'threshold-text': (dict(thresholds=('0.5',)), "threshold .* got '0.5'"),
    'threshold-list': (dict(thresholds=([0.5],)), r'threshold .* got \[0.5\]'),
    'patience-zero': (
        dict(criterion='patience', thresholds=(0,)),
        r"threshold of 'patience' must be an integer in \[1, 1000\], .* got 0",
    ),
    'patience-part': (dict(criterion='patience', thresholds=(1.5,)), 'threshold .* got 1.5'),
    'patience-nan': (dict(criterion='patience', thresholds=(math.nan,)), 'threshold .* got nan'),
    'patience-huge': (dict(criterion='patience', thresholds=(10**400,)), 'threshold .* got 1000'),
    'patience-above': (dict(criterion='patience', thresholds=(1001,)), 'threshold .* got 1001'),
    'temperatures-number': (dict(thresholds=(0.5,), temperatures=2.0), 'temperatures must be .* got 2.0'),
    'temperatures-few': (
        dict(thresholds=(0.5,), temperatures=(1.0,)),
        'temperatures must be empty or have 2 values, .* got 1',
    ),
    'temperatures-many': (
        dict(thresholds=(), temperatures=(1.0, 1.0)),
        'temperatures must be empty or have 1 values, .* got 2',
    ),
    'temperature-zero': (dict(thresholds=(0.5,), temperatures=(0, 1)), r'temperature must be in \[0.01, 100\], got 0'),
    'temperature-nan': (dict(thresholds=(0.5,), temperatures=(1, math.nan)), 'temperature must be .* got nan'),
    'temperature-none': (dict(thresholds=(0.5,), temperatures=(None, 1)), 'temperature must be .* got None'),
    'temperature-high': (dict(thresholds=(0.5,), temperatures=(101, 1)), 'temperature must be .* got 101'),
}


@pytest.mark.parametrize('case', BAD_POLICIES)
def test_policy_out_of_range_is_refused_in_one_line(case):
    values, message = BAD_POLICIES[case]
    with pytest.raises(MultiExitError, match=message) as error:
        ExitPolicy(**values)
    assert '\n' not in str(error.value)
    with pytest.raises(MultiExitError, match=message):
        ExitPolicy.from_dict({'criterion': 'confidence', 'thresholds': [], **values})


@pytest.mark.parametrize('values', [None, [], 'confidence', {}, {'criterion': 'confidence'}, {'thresholds': []}])
def test_what_is_no_policy_is_refused_in_one_line(values):
    with pytest.raises(MultiExitError, match='criterion and thresholds') as error:
        ExitPolicy.from_dict(values)
    assert '\n' not in str(error.value)


NAN_ROW = torch.tensor([[0.0, 1.0], [math.nan, 0.0], [0.0, 1.0]])
GOOD = torch.zeros(3, 2)
BAD_LOGITS = {
    'none': ([], 'two or more classifiers.* got 0 of shapes'),
    'main-alone': ([GOOD], 'two or more classifiers.* got 1 of shapes'),
    'other-shapes': ([GOOD, torch.zeros(3, 4)], r'\[\[3, 2\], \[3, 4\]\]'),
    'other-counts': ([GOOD, torch.zeros(2, 2)], r'\[\[2, 2\], \[3, 2\]\]'),
    'three-axes': ([torch.zeros(3, 2, 1)] * 2, r'\[\[3, 2, 1\]\]'),
    'one-axis': ([torch.zeros(3)] * 2, r'\[\[3\]\]'),
    'no-samples': ([torch.zeros(0, 2)] * 2, r'1 or more samples.*\[0, 2\]'),
    'no-classes': ([torch.zeros(3, 0)] * 2, r'2 or more classes.*\[3, 0\]'),
    'one-class': ([torch.zeros(3, 1)] * 2, r'2 or more classes.*\[3, 1\]'),
    'nan-exit': ([NAN_ROW, GOOD], 'exit 0 are NaN or infinite for 1 of 3 samples'),
    'nan-main': ([GOOD, NAN_ROW], 'main are NaN or infinite for 1 of 3 samples'),
    'inf': ([GOOD, GOOD + INF, GOOD], 'exit 1 are NaN or infinite for 3 of 3'),
    'all-masked': ([GOOD, torch.tensor([[-INF, -INF], [0, -INF], [-INF, 0]])], 'main are NaN or infinite for 1 of 3'),
}


@pytest.mark.parametrize('case', BAD_LOGITS)
def test_logits_that_no_policy_can_decide_on_are_refused_in_one_line(case):
    logits, message = BAD_LOGITS[case]
    for call in (check_logits, lambda logits: apply_policy(ExitPolicy('confidence', (0.5,)), logits)):
        with pytest.raises(MultiExitError, match=message) as error:
            call(logits)
        assert '\n' not in str(error.value)


@pytest.mark.parametrize('count', [0, 3, 5])
def test_policy_for_another_number_of_exits_is_refused_in_one_line(count):
    with pytest.raises(MultiExitError, match=f'each of the 4 exits of the model, got {count}') as error:
        apply_policy(ExitPolicy('confidence', (0.5,) * count), make_logits())
    assert '\n' not in str(error.value)


# Stored and passed on


@pytest.mark.parametrize(('criterion', 'thresholds', 'temperatures', 'how'), CASES[::7])
def test_policy_comes_back_from_json(criterion, thresholds, temperatures, how):
    policy = ExitPolicy(criterion, thresholds, temperatures, how)
    text = json.dumps(policy.to_dict(), allow_nan=False)
    assert ExitPolicy.from_dict(json.loads(text)) == policy
    assert ExitPolicy.from_dict({**json.loads(text), 'later': 1}) == policy


def test_policy_of_lists_is_that_of_tuples_and_cannot_be_changed():
    policy = ExitPolicy('margin', [0.5, None], [1.0, 2, 3.0])
    assert policy == ExitPolicy('margin', (0.5, None), (1.0, 2.0, 3.0))
    assert hash(policy) == hash(ExitPolicy('margin', (0.5, None), (1.0, 2.0, 3.0)))
    with pytest.raises(AttributeError):
        policy.combine = 'mean'


def test_fields_that_may_be_missing_have_their_defaults():
    policy = ExitPolicy.from_dict({'criterion': 'entropy', 'thresholds': [0.25]})
    assert policy == ExitPolicy('entropy', (0.25,), (), None)


def test_prediction_is_a_tree_of_two_tensors():
    prediction = apply_policy(ExitPolicy('confidence', (0.5,) * 4), make_logits())
    leaves, spec = tree_flatten(prediction)
    assert len(leaves) == 2
    assert isinstance(tree_unflatten(leaves, spec), Prediction)


def test_logits_may_come_one_by_one():
    logits = [torch.randn(4, 3) for _ in range(3)]
    policy = ExitPolicy('confidence', (0.5, 0.6))
    one, other = apply_policy(policy, iter(logits)), apply_policy(policy, logits)
    assert torch.equal(one.logits, other.logits)
