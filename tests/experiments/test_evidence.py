"""Plans, results and tables of the evidence."""

import importlib.util
import json
import math
import re
import statistics
from pathlib import Path

import pytest
import torch
import yaml
from evidence.plan import METHODS_FILE, PlannedRun, read_plan, read_yaml
from evidence.results import collect_result, is_done, read_results, write_result
from evidence.table import (
    END,
    START,
    baselines,
    describe_difference,
    format_tables,
    interval,
    paired,
    place_in,
)
from PIL import Image

import timm_multiexit.backbones  # noqa: F401 - registers the networks
from timm_multiexit.cli.flags.train_args import parse_train_args
from timm_multiexit.utils.errors import MultiExitError

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ROOT / 'hub/experiments'
PLANS = sorted((EXPERIMENTS / 'plans').glob('*.yaml'))
METHODS = read_yaml(EXPERIMENTS / METHODS_FILE)


def load_script(name):
    spec = importlib.util.spec_from_file_location(f'experiments_{name}', EXPERIMENTS / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_result(method, seed, extra=(), **top1):
    """A result as hub/experiments/run.py writes it, of plan small."""
    run = next(run for run in SMALL.runs if (run.method, run.seed) == (method, seed))
    return {
        'format': 1,
        **{key: getattr(run, key) for key in ('name', 'protocol', 'data', 'network', 'method', 'seed', 'flags')},
        'split': 'val',
        'num_samples': 10000,
        'classifiers': [{'exit': name.strip('_'), 'top-1': value, 'ECE': 0.05} for name, value in top1.items()],
        'selection': {'by': 'top1', 'on': '5000 images held out of train', 'is_reported_split': False},
        'seconds': 600.0,
        'commit': 'abc',
        'hardware': '2 x cpu',
        'threads': '1 torch threads',
        'versions': 'torch 2',
        'extra': list(extra),
    }


SMALL = read_plan(EXPERIMENTS / 'plans/small.yaml')
# Main and ensemble of three seeds.
NUMBERS = {
    'plain': [(80.0,), (81.0,), (80.5,)],
    'ce': [(60.0, 80.2, 80.0), (61.0, 81.1, 80.9), (62.0, 80.7, 80.4)],
    'eed-kl': [(61.0, 80.7, 80.9), (62.0, 81.7, 81.7), (63.0, 81.15, 81.3)],
}


@pytest.fixture
def results():
    names = {1: ('main',), 3: ('_0', 'main', 'ens')}
    return [
        make_result(method, seed, **dict(zip(names[len(values)], values)))
        for method, runs in NUMBERS.items()
        for seed, values in enumerate(runs)
    ]


# Plans of this repository


@pytest.mark.parametrize('path', PLANS, ids=lambda path: path.stem)
def test_plans_have_every_run_once_and_train_py_takes_their_flags(path):
    plan, content = read_plan(path), yaml.safe_load(path.read_text())
    counts = [len(content[key]) for key in ('data', 'networks', 'methods', 'seeds')]
    assert len({run.name for run in plan.runs}) == len(plan.runs) == math.prod(counts)
    assert [run.seed for run in plan.runs] == sorted(run.seed for run in plan.runs)


@pytest.mark.parametrize('path', sorted((ROOT / 'hub/recipes').glob('*.yaml')), ids=lambda path: path.stem)
def test_recipes_are_configurations_of_train_py(path):
    args = parse_train_args(['--config', str(path), '--data-dir', 'data'])
    assert args.val_from_train, 'no epoch is chosen on the reported images'
    head = path.read_text().replace('\n# ', ' ').splitlines()[0]
    for machine in ('(one|two) CPU core', 'a GPU'):
        assert re.search(rf'\d+ (minutes|hours|days)[^.]* on {machine}', head), 'it says how long it takes'


def test_runs_of_small_differ_in_method_and_seed_alone():
    exits = {'exits', 'exit-head', 'exit-loss', 'exit-output-loss'}
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
        'beed-kl-narrow': ('all', 1.0, 0.0),
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
        if flags:
            run = PlannedRun('short16', 'c', 'cifar_resnet18', name, 0, ROOT / 'hub/recipes/short16.yaml', flags, flags)
            loss = create_task(parse_train_args(run.arguments('data')), model, torch.device('meta')).loss
            found[name] = (loss.teacher, loss.output_weight, loss.feature_weight)
            assert loss.teacher is None or loss.output_loss == name.split('-')[1]
    assert found == expected


# Results


def make_folder(folder, run, **changes):
    """What train.py leaves, as far as it is read."""
    folder.mkdir()
    stamp = dict.fromkeys(('commit', 'versions', 'hardware', 'threads', 'weights'), 'x')
    content = {
        'rows': [{'exit': 'main', 'tap': 'classifier', 'top-1': 70.0, 'ECE': 0.1}],
        'split': 'val',
        'num_samples': 10000,
        'dataset': run.data,
        'input_size': [3, 32, 32],
        'epoch_chosen_by': 'top1',
        'epoch_chosen_on': '5000 images held out of train',
        'best_epoch': 1,
        'epochs': 2,
        'is_reported_split': False,
        'seed': run.seed,
        'command': ['/root/secret/train.py'],
        **stamp,
    }
    (folder / 'results.json').write_text(json.dumps(content | changes))
    (folder / 'summary.csv').write_text(
        'epoch,train_loss,eval_loss,eval_top1,lr,train_exit0_top1,train_main_top1,train_exit0_loss,eval_exit0_top1\n'
        '0,nan,2,40,0.1,50,55,3,30\n1,1,,70,0.05,90,99.5,2,60\n'
    )
    return folder


def test_result_has_the_numbers_of_the_run_and_no_folder_of_this_machine(tmp_path):
    run = SMALL.runs[1]
    folder = make_folder(tmp_path / 'run', run)
    result = collect_result(run, folder, seconds=12.34, extra=['--initial-checkpoint', '/root/secret/net.pth'])
    first = {'epoch': 0, 'train_loss': None, 'eval_loss': 2.0, 'eval_top1': 40.0, 'lr': 0.1, 'eval_exit0_top1': 30.0}
    last = {'epoch': 1, 'train_loss': 1.0, 'eval_top1': 70.0, 'lr': 0.05, 'eval_exit0_top1': 60.0}
    assert result['validation'] == [
        first | {'train_exit0_top1': 50.0, 'train_main_top1': 55.0},
        last | {'train_exit0_top1': 90.0, 'train_main_top1': 99.5},
    ]
    assert result['classifiers'][0]['top-1'] == 70.0
    assert (result['seconds'], result['method'], result['seed']) == (12.3, 'ce', 0)
    assert result['selection'] == {
        'by': 'top1',
        'on': '5000 images held out of train',
        'epoch': 1,
        'epochs': 2,
        'is_reported_split': False,
    }
    assert result['command'].startswith('train.py --config hub/recipes/short16.yaml --data-dir cifar10 ')
    assert result['command'].endswith('--seed 0 --initial-checkpoint net.pth')
    text = json.dumps(result, allow_nan=False)
    assert '/root' not in text
    assert str(ROOT) not in text
    assert str(tmp_path) not in text


def test_result_that_was_written_counts_as_done_and_is_read_again(tmp_path):
    run = SMALL.runs[0]
    result = collect_result(run, make_folder(tmp_path / 'run', run), seconds=1)
    assert not is_done(run, tmp_path / 'results')
    write_result(tmp_path / 'results', run, result)
    assert is_done(run, tmp_path / 'results')
    assert read_results(tmp_path / 'results') == [result]
    assert [path.name for path in (tmp_path / 'results').iterdir()] == [f'{run.name}.json']


@pytest.mark.parametrize(
    ('changes', 'message'), [({'seed': 7}, 'is of seed 7'), ({'dataset': 'c100'}, 'and c100, not')]
)
def test_results_of_another_seed_or_data_are_refused(tmp_path, changes, message):
    run = SMALL.runs[0]
    with pytest.raises(MultiExitError, match=message):
        collect_result(run, make_folder(tmp_path / 'run', run, **changes), seconds=1)


@pytest.mark.parametrize('text', ['{', '[]', '{"format": 1}', '{"name": 1}'])
def test_file_that_is_no_result_is_refused_by_name(tmp_path, text):
    (tmp_path / 'a.json').write_text(text)
    with pytest.raises(MultiExitError, match='a.json'):
        read_results(tmp_path)


# Statistics


def test_interval_holds_the_mean_in_nineteen_of_twenty_samples():
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(4000, 3, generator=generator, dtype=torch.float64) * 0.7 + 1.5
    hits = sum(abs(mean - 1.5) <= half for mean, half in (interval(sample.tolist()) for sample in samples))
    # Four standard deviations of the binomial distribution.
    assert abs(hits / 4000 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 4000)


def test_interval_is_smaller_than_that_of_unpaired_runs_where_seeds_move_both(results):
    differences = paired(results, 'eed-kl', 'ce', 'main')
    assert differences == pytest.approx([0.5, 0.6, 0.45])
    mean, half = interval(differences)
    assert mean == pytest.approx(0.5167, abs=1e-4)
    assert half == pytest.approx(4.303 * statistics.stdev([0.5, 0.6, 0.45]) / math.sqrt(3))
    assert half < 0.2 < 4.303 * statistics.stdev([80.2, 81.1, 80.7]) / math.sqrt(3)


def test_pairs_are_of_one_seed(results):
    without = [result for result in results if (result['method'], result['seed']) not in (('ce', 1), ('eed-kl', 0))]
    assert paired(without, 'eed-kl', 'ce', 'main') == pytest.approx([0.45])
    assert paired(without, 'eed-kl', 'plain', 'ens') == []


@pytest.mark.parametrize(
    ('differences', 'reading'),
    [
        ([0.3, 0.5, 0.4], 'above 0'),
        ([-0.3, -0.5, -0.4], 'below 0'),
        ([0.1, -0.1, 0.0], 'no difference seen'),
        ([1.0, 1.5, 1.1], 'not resolved'),  # above 0, but by how much is not known to 0.4 points
    ],
)
def test_reading_says_what_the_interval_says(differences, reading):
    assert describe_difference(differences).endswith(f', {reading}')


def test_distances_are_compared_with_their_like():
    assert baselines('eed-kl', METHODS) == ['plain', 'ce', 'phuong-kl', 'byot-kl']
    assert baselines('eed-mse-teacher-0-main', METHODS) == ['plain', 'ce', 'phuong-mse', 'byot-mse', 'eed-mse']
    assert baselines('eed-kl-narrow', METHODS) == ['plain', 'eed-kl', 'ce-narrow', 'phuong-kl-narrow', 'byot-kl-narrow']
    assert baselines('eed-mse-bottleneck', METHODS) == ['plain', 'eed-mse', 'ce-bottleneck']
    assert baselines('beed-kl', METHODS) == ['plain', 'ce', 'phuong-kl', 'byot-kl', 'eed-kl']
    assert baselines('eed-kl-weight-1', METHODS) == ['plain', 'ce', 'phuong-kl', 'byot-kl', 'eed-kl']
    assert [baselines(name, METHODS) for name in ('plain', 'ce', 'phuong-kl', 'ce-narrow')] == [[], [], [], ['ce']]


# Tables


def test_table_has_means_deviations_differences_and_what_is_missing(results):
    text = format_tables([SMALL], results, list(METHODS))
    assert '9 of the 15 runs of plan `small`' in text
    assert '| method | n | exit 0 | main | ensemble | main ECE |' in text
    assert '| `plain` | 3 | - | 80.50 ± 0.50 | - | 0.050 |' in text
    assert '| `ce` | 3 | 61.00 ± 1.00 | 80.67 ± 0.45 | 80.43 ± 0.45 | 0.050 |' in text
    assert '| `eed-kl` - `ce` | 3 | +0.52 ± 0.19, above 0 | +0.87 ± 0.14, above 0 |' in text
    assert '| `eed-kl` - `plain` | 3 | +0.68 ± 0.07, above 0 | - |' in text
    assert '5000 images held out of train' in text
    missing = [f'{method} seed {seed}' for seed in range(3) for method in ('phuong-kl', 'eed-mse')]
    assert f'Planned and missing: {", ".join(missing)}.' in text


def test_plan_without_results_takes_one_line():
    assert format_tables([SMALL], [], list(METHODS)).count('\n') == 1


def test_results_of_other_images_or_flags_do_not_come_into_one_table(results):
    results[0]['num_samples'] = 5000
    with pytest.raises(MultiExitError, match='differ in num_samples'):
        format_tables([SMALL], results, list(METHODS))
    results[0] = make_result('plain', 0, extra=['--amp'], main=80.0)
    with pytest.raises(MultiExitError, match='differ in extra'):
        format_tables([SMALL], results, list(METHODS))


@pytest.mark.parametrize('text', ['', START, f'{END}{START}', f'{START}{END}{START}'])
def test_file_without_the_two_comments_is_refused(text):
    with pytest.raises(MultiExitError, match='once each'):
        place_in(text, 'tables')


def test_script_prints_and_writes_the_tables(tmp_path, results, run_script):
    table = load_script('table')
    (tmp_path / 'results').mkdir()
    for result in results:
        (tmp_path / 'results' / f'{result["name"]}.json').write_text(json.dumps(result))
    expected = format_tables([SMALL], results, list(METHODS))
    flags = ('--results', tmp_path / 'results')
    assert run_script(table.main, EXPERIMENTS / 'plans/small.yaml', *flags) == (0, expected, '')
    readme = tmp_path / 'README.md'
    readme.write_text(f'# A\n{START}\nold\n{END}\nrest\n')
    others = [read_plan(path) for path in PLANS if path.stem != 'small']
    assert len(others) == 8
    expected = format_tables([SMALL, *others], results, list(METHODS))  # what was measured comes first
    assert run_script(table.main, *flags, '--readme', readme) == (0, '', '')
    assert readme.read_text() == f'# A\n{START}\n{expected}{END}\nrest\n'
    results[0]['flags'] = results[0]['flags'] | {'lr': 0.7}
    (tmp_path / 'results' / f'{results[0]["name"]}.json').write_text(json.dumps(results[0]))
    code, out, err = run_script(table.main, *flags)
    assert (code, out) == (2, '')
    assert 'was made with lr 0.7, the plan says 0.1' in err


def test_readme_has_the_tables_that_the_script_gives():
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    assert place_in(text, load_script('table').make_tables([], EXPERIMENTS / 'results')) == text


# Images


def test_images_are_made_smaller_and_drawn_the_same_again(tmp_path, run_script):
    prepare = load_script('prepare')
    for split, count in (('train', 6), ('val', 2)):
        for name in ('cat', 'dog'):
            folder = tmp_path / 'large' / split / name
            folder.mkdir(parents=True)
            for idx in range(count):
                Image.new('L', (40, 20), 10 * idx).save(folder / f'{idx}.png')

    def draw(target, *flags):
        code, _, error = run_script(prepare.main, tmp_path / 'large', tmp_path / target, '--size', '8', *flags)
        assert (code, error) == (0, '')
        return {path.relative_to(tmp_path / target) for path in (tmp_path / target).rglob('*.png')}

    few, again = draw('few', '--per-class', '2'), draw('again', '--per-class', '2')
    more, every = draw('more', '--per-class', '4'), draw('every')
    other = draw('other', '--per-class', '4', '--seed', '1')
    assert few == again
    assert few < more < every
    assert other != more
    assert [len(draw) for draw in (few, more, every)] == [2 * 2 + 4, 2 * 4 + 4, 2 * 6 + 4]
    with Image.open(tmp_path / 'every/train/cat/3.png') as image:
        assert (image.mode, image.size, image.getpixel((4, 4))) == ('RGB', (8, 8), (30, 30, 30))
    code, _, error = run_script(prepare.main, tmp_path / 'large', tmp_path / 'none', '--per-class', '7')
    assert code == 2
    assert '--per-class is 7, allowed are 1 to 6' in error
