"""Tables and pages that are made from numbers in the repository: they are what their commands write."""

import csv
import json
import re
from pathlib import Path

import pytest
from helpers.experiments import load_script
from helpers.families import ENCODERS, FAMILIES

from benchmarks import zoo
from timm_multiexit.factory import create_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope='module')
def tables():
    return load_script('../tables')


@pytest.fixture(scope='module')
def made(tables):
    return tables.make_tables()


def test_files_are_what_the_command_writes(made):
    assert {'docs/zoo.md', 'docs/models.md', 'docs/cascade.md', 'hub/results/results-checkpoints.csv'} <= set(made)
    stale = [name for name, text in made.items() if (ROOT / name).read_text(encoding='utf-8') != text]
    assert not stale, 'run hub/tables.py'
    kept = {path.relative_to(ROOT).as_posix() for path in (ROOT / 'hub/results').glob('*.csv')}
    assert kept == {name for name in made if name.endswith('.csv')}


def test_rows_of_experiments_are_those_of_the_json_files():
    rows = []
    for path in (ROOT / 'hub/results').glob('results-*.csv'):
        if 'checkpoints' not in path.name:
            rows += csv.DictReader(path.open(encoding='utf-8'))
    found = {(row['model'], row['method'], row['seed'], row['exit'], row['commit'], row['top1']) for row in rows}
    expected = set()
    for path in (ROOT / 'hub/experiments/results').glob('*.json'):
        result = json.loads(path.read_text(encoding='utf-8'))
        same = (result['network'], result['method'], str(result['seed']))
        expected |= {
            (*same, row['exit'], result['commit'], str(round(row['top-1'], 4))) for row in result['classifiers']
        }
    assert found == expected
    assert all(float(row['top1']) + float(row['top1_err']) == pytest.approx(100) for row in rows)
    assert all(float(row['infer_gmacs_sequential']) > 0 for row in rows)


def test_rows_of_checkpoints_have_accuracy_cost_and_speed():
    rows = list(csv.DictReader((ROOT / 'hub/results/results-checkpoints.csv').open(encoding='utf-8')))
    row = next(row for row in rows if (row['model'], row['exit']) == ('imagenette_lite0_eed', 'main'))
    assert float(row['top1']) == pytest.approx(97.6306, abs=1e-4)
    assert float(row['infer_gmacs']) == 0.195884
    assert float(row['infer_samples_per_sec']) == pytest.approx(1000 / 11.6561, abs=0.01)  # of a median of 11.66 ms
    policies = [row for row in rows if row['exit'].startswith('budget')]
    assert len(policies) == 7
    assert all(row['infer_batch_size'] == '64' for row in policies)


def test_page_of_models_has_main_and_the_default_policy(made):
    (line,) = [line for line in made['docs/models.md'].splitlines() if line.startswith('| `imagenette_lite0_eed`')]
    cells = [cell.strip() for cell in line.strip('|').split('|')]
    assert cells[3:11] == ['6', '3.384', '195.9', '97.63', '`budget 50%`', '97.22', '49.0', '1.53']


def test_page_on_the_cascade_has_every_network_and_budget(made):
    validation = json.loads((ROOT / 'hub/results/cascade.json').read_text(encoding='utf-8'))
    rivals, lines = validation['rivals'], made['docs/cascade.md'].splitlines()
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines if line.startswith('|')]
    networks, budgets = rows[2 : 2 + len(rivals['rows'])], rows[4 + len(rivals['rows']) :]
    assert [(row[0].strip('`'), row[2]) for row in networks] == [
        (row['name'], f'{row["top-1"]:.2f}') for row in rivals['rows']
    ]
    assert {row[1] for row in networks} == {'main', 'own', 'cascade', 'static'}
    pairs = rivals['cascade']['pairs']
    assert len(budgets) == len(pairs[::3]) == 13
    for row, pair in zip(budgets, pairs[::3]):
        numbers = [pair['budget_macs'] / 1e6, pair['own']['macs'] / 1e6, pair['own']['top-1']]
        assert [float(cell) for cell in row[:3]] == pytest.approx(numbers, abs=0.051)
        other = pair['cascade']
        assert row[3:] == ['-', '-'] if other is None else float(row[4]) == pytest.approx(other['top-1'], abs=0.0051)
    assert sum(pair['cascade'] is None for pair in pairs) > 0
    assert 'local-dir:/' not in made['docs/cascade.md']


def test_page_of_families_has_every_family_once():
    lines = (ROOT / 'docs/zoo.md').read_text(encoding='utf-8').splitlines()
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines if line.startswith('|')][2:]
    assert {row[0]: row[1].strip('`') for row in rows} == FAMILIES
    assert len(rows) == len(FAMILIES)
    by_name = {row[0]: row for row in rows}
    assert by_name['TNT'][4] == 'at none'
    assert by_name['EfficientViM'][4] == 'at 0'
    *costs, main = create_model('test_resnet').cost()
    shares = [[f'{100 * cost.macs / main.fixed.macs:.{digits}f}' for cost in row] for row, digits in (
        ([cost.head for cost in costs], 1), ([cost.fixed for cost in costs], 0)
    )]  # fmt: skip
    assert by_name['ResNet'][-2:] == [' / '.join(row) for row in shares]


def test_pictures_are_drawn_from_the_numbers_alone(tables):
    pictures = tables.draw_pictures(ROOT, figures=True)
    assert all(content.startswith(b'\x89PNG') and (ROOT / name).is_file() for name, content in pictures.items())
    assert len([name for name in pictures if re.search('hub/checkpoints/.*/accuracy_vs_macs.png', name)]) == 2
    assert {Path(name).stem for name in pictures} > {'fig3_main_and_ensemble', 'fig5_training', 'table4_diversity'}


def test_coverage_keeps_what_is_measured_and_goes_on(tmp_path, monkeypatch):
    path = tmp_path / 'coverage.json'
    options = {'again': False, 'show': lambda line: None}
    first = zoo.measure_coverage(['test_resnet', ENCODERS[-1]], ['ResNet'], path, **options)
    encoder, resnet = first['models']
    assert resnet['family'] == 'ResNet'
    assert resnet['exits'] == len(resnet['heads']) == 3
    assert 'has no classifier' in encoder['reason']
    (tried,) = first['families']
    assert tried.items() >= {'family': 'ResNet', 'model': 'test_resnet', 'px': 64, 'can_leave': [True] * 3}.items()
    assert resnet['commit'] == tried['commit']
    assert json.loads(path.read_text()) == first
    monkeypatch.setattr(zoo, 'look_at_model', lambda name: {'model': name, 'reason': 'new'})
    second = zoo.measure_coverage(['test_resnet', 'test_vit'], ['ResNet'], path, **options)
    assert [row for row in second['models'] if row['model'] != 'test_vit'] == first['models']
    assert second['models'][-1] == {'model': 'test_vit', 'reason': 'new', 'commit': resnet['commit']}


def test_a_program_that_disagrees_and_one_that_was_not_tried_are_told_apart():
    rows = [{'family': name, 'model': 'm', 'px': 64, 'can_leave': [False, True], 'commit': name} for name in 'abc']
    refused = [{'model': 'encoder', 'reason': 'has no classifier', 'commit': 'a'}]
    coverage = {'models': refused, 'families': rows, 'timm': '1', 'versions': 'python 3, torch 2'}
    parity = {
        'limit': 1e-5,
        'rows': [{'network': 'a', 'result': 'equal'}, {'network': 'b', 'result': 'above 1e-05: x'}],
    }
    page = zoo.format_zoo(coverage, parity)
    assert re.findall('at 1 . ([^|]*) .', page) == ['yes', 'above 1e-05', 'not tried']
    assert 'no classifier of which an exit could be an early answer: `encoder`.' in page
    assert 'timm_multiexit at a, b, c.' in page
    assert 'of 2 whose exported programs were compared 1 agree' in page
