"""Plans and recipes of this repository, and the methods that they compare."""

import math
import re

import pytest
import torch
import yaml
from evidence.plan import PlannedRun, read_plan
from helpers.experiments import METHODS, PLANS, ROOT, SMALL

import timm_multiexit.backbones  # noqa: F401 - registers the networks
from timm_multiexit.cli.flags.train_args import parse_train_args
from timm_multiexit.utils.errors import InvalidValueError


@pytest.mark.parametrize('path', PLANS, ids=lambda path: path.stem)
def test_plans_have_every_run_once_and_train_py_takes_their_flags(path):
    plan, content = read_plan(path), yaml.safe_load(path.read_text())
    counts = [len(content[key]) for key in ('data', 'networks', 'methods', 'seeds')]
    assert len({run.name for run in plan.runs}) == len(plan.runs) == math.prod(counts)
    assert [run.seed for run in plan.runs] == sorted(run.seed for run in plan.runs)


@pytest.mark.parametrize(
    ('key', 'value'),
    [('seeds', 3), ('seeds', [0, 0]), ('methods', None), ('networks', 'cifar_resnet8'), ('data', ['a', 'a'])],
)
def test_values_of_a_plan_that_are_no_lists_are_refused(key, value, tmp_path):
    content = yaml.safe_load((ROOT / 'hub/experiments/plans/small.yaml').read_text())
    (tmp_path / 'plan.yaml').write_text(yaml.safe_dump({**content, key: value}))
    with pytest.raises(InvalidValueError, match=f'plan.yaml: {key} must be a list without anything twice, got '):
        read_plan(tmp_path / 'plan.yaml')


@pytest.mark.parametrize('path', sorted((ROOT / 'hub/recipes').glob('*.yaml')), ids=lambda path: path.stem)
def test_recipes_are_configurations_of_train_py(path):
    args = parse_train_args(['--config', str(path), '--data-dir', 'data'])
    assert args.val_from_train, 'no epoch is chosen on the reported images'
    head = path.read_text().replace('\n# ', ' ').splitlines()[0]
    for machine in ('(one|two) CPU core', 'a GPU'):
        assert re.search(rf'\d+ (minutes?|hours?|days?)[^.]* on {machine}', head), 'it says how long it takes'


def test_runs_of_small_differ_in_method_and_seed_alone():
    exits = {'exits', 'exit-head', 'exit-loss', 'exit-output-loss', 'exit-teacher-weights'}
    common = [{key: value for key, value in run.flags.items() if key not in {*exits, 'seed'}} for run in SMALL.runs]
    assert all(flags == common[0] for flags in common)
    assert SMALL.runs[0].method == 'plain'
    assert not exits & set(SMALL.runs[0].flags)


def test_methods_are_the_papers_losses():
    # Who teaches, distance of outputs and its weight, weight of features: equations 2 to 8 and Table IV.
    from timm_multiexit.cli.build_training import create_task
    from timm_multiexit.factory import create_model

    expected = {
        'ce': (None, 0.0, 0.0),
        'phuong-kl': ('main', 0.1, 0.0),
        'phuong-mse': ('main', 1.0, 0.0),
        'byot-kl': ('main', 0.1, 1.0),
        'byot-mse': ('main', 1.0, 1.0),
        'eed-kl': ('all', 0.1, 0.0),
        'eed-mse': ('all', 1.0, 0.0),
        'eed-kl-features': ('all', 0.1, 1.0),
        'eed-kl-skill': ('all', 0.1, 0.0),
        'eed-mse-features': ('all', 1.0, 1.0),
        'eed-mse-teacher-0-main': ((0, -1), 1.0, 0.0),
        'eed-mse-teacher-2-main': ((2, -1), 1.0, 0.0),
        'eed-mse-teacher-0-2-main': ((0, 2, -1), 1.0, 0.0),
        'eed-mse-teacher-exits': ((0, 1, 2), 1.0, 0.0),
        'ce-narrow': (None, 0.0, 0.0),
        'phuong-kl-narrow': ('main', 0.1, 0.0),
        'byot-kl-narrow': ('main', 0.1, 1.0),
        'eed-kl-narrow': ('all', 0.1, 0.0),
        'eed-mse-narrow': ('all', 1.0, 0.0),
        'eed-kl-features-narrow': ('all', 0.1, 1.0),
        'eed-kl-teacher-0-main-narrow': ((0, -1), 0.1, 0.0),
        'eed-kl-teacher-2-main-narrow': ((2, -1), 0.1, 0.0),
        'eed-kl-teacher-0-2-main-narrow': ((0, 2, -1), 0.1, 0.0),
        'eed-kl-teacher-exits-narrow': ((0, 1, 2), 0.1, 0.0),
        'eed-kl-skill-narrow': ('all', 0.1, 0.0),
        'beed-kl-narrow': ('all', 1.0, 0.0),
        'ce-quarters': (None, 0.0, 0.0),
        'eed-kl-quarters': ('all', 0.1, 0.0),
        'ce-quarters-frozen': (None, 0.0, 0.0),
        'ce-quarters-fixednorms': (None, 0.0, 0.0),
        'eed-kl-quarters-fixednorms': ('all', 0.1, 0.0),
        'eed-kl-quarters-frozen': ('all', 0.1, 0.0),
        'ce-bottleneck': (None, 0.0, 0.0),
        'eed-kl-bottleneck': ('all', 0.1, 0.0),
        'eed-mse-bottleneck': ('all', 1.0, 0.0),
        'eed-kl-weight-1': ('all', 1.0, 0.0),
        'beed-kl': ('all', 1.0, 0.0),
        'beed-mse': ('all', 1.0, 0.0),
    }
    with torch.device('meta'):
        model = create_model('cifar_resnet18', exits='auto', head='paper', num_classes=10)
    found = {}
    for name, flags in METHODS.items():
        if 'exits' in flags:
            flags = {**flags, 'pretrained': True}  # which some need
            run = PlannedRun('short16', 'c', 'cifar_resnet18', name, 0, ROOT / 'hub/recipes/short16.yaml', flags, flags)
            loss = create_task(parse_train_args(run.arguments('data')), model, torch.device('meta')).loss
            found[name] = (loss.teacher, loss.output_weight, loss.feature_weight)
            assert loss.teacher is None or loss.output_loss == name.split('-')[1]
    assert found == expected
