"""Tables of results."""

import json

import pytest
from evidence.differences import paired
from evidence.plan import read_plan
from evidence.results import read_results
from evidence.table import END, START, format_summary, format_tables, place_in
from helpers.experiments import EXPERIMENTS, METHODS, PLANS, ROOT, SMALL, load_script, make_result

from timm_multiexit.utils.errors import MultiExitError


def test_table_has_means_deviations_differences_and_what_is_missing(results):
    text = format_tables([SMALL], results, list(METHODS))
    assert '9 of the 18 runs of plan `small`' in text
    assert '| method | n | exit 0 | main | ensemble | main ECE |' in text
    assert '| `plain` | 3 | - | 80.50 ± 0.50 | - | 0.050 |' in text
    assert '| `ce` | 3 | 61.00 ± 1.00 | 80.67 ± 0.45 | 80.43 ± 0.45 | 0.050 |' in text
    assert '| `eed-kl` - `ce` | 3 | +1.00 ± 0.00, above 0 | +0.52 ± 0.19, above 0 | +0.87 ± 0.14, above 0 |' in text
    assert '| `eed-kl` - `plain` | 3 | - | +0.68 ± 0.07, above 0 | - |' in text
    assert '5000 images held out of train' in text
    missing = '`phuong-kl` 0, 1, 2; `eed-mse` 0, 1, 2; `eed-kl-skill` 0, 1, 2.'
    assert f'Planned and missing, seeds of: {missing}\n' in text


def test_curves_say_how_main_learns(results):
    curves = {'plain': (50.0, 70.0, 71.0), 'ce': (52.0, 60.0, 70.0), 'eed-kl': (60.0, 70.5, 70.0)}
    for result in results:
        accuracies = [top1 + result['seed'] for top1 in curves[result['method']]]
        result['validation'] = [
            {'epoch': idx, 'eval_top1': top1, 'train_main_top1': top1 + 10} for idx, top1 in enumerate(accuracies)
        ]
        if (result['method'], result['seed']) == ('eed-kl', 2):
            result['validation'][1]['eval_top1'] = result['validation'][2]['eval_top1'] = 71.9  # ce's end is at 72
    text = format_tables([SMALL], results, list(METHODS))
    header = "| method | main at the end, training images | sd of changes between epochs | epochs to ce's end |"
    assert header in text
    assert '| `plain` | 82.00 ± 1.00 | 13.44 | 2.0 |' in text  # of changes by 20 and 1
    assert '| `ce` | 81.00 ± 1.00 | 1.41 | 3.0 |' in text
    # Changes by 10.5 and -0.5 twice, then by 9.9 and 0.
    assert '| `eed-kl` | 81.00 ± 1.00 | 7.52 | 2.0, 2 of 3 runs |' in text
    for result in results:  # --val-interval 2: the third epoch is the last, and is evaluated anyhow
        del result['validation'][0]['eval_top1']
    text = format_tables([SMALL], results, list(METHODS))
    assert '| `plain` | 82.00 ± 1.00 | 2.0 |' in text


def test_runs_that_chose_the_warm_up_are_told_and_not_summarized(results):
    for result in results:
        result['flags'] = {**result['flags'], 'pretrained': True}
        result['selection'] = {**result['selection'], 'epoch': 0 if result['seed'] < 2 else 1}
        result['validation'] = [
            {'epoch': 0, 'eval_top1': 90.0, 'eval_exit0_top1': 50.0},
            {'epoch': 1, 'eval_top1': 80.0},
        ]
        if result['method'] == 'eed-kl':
            result['validation'][1]['eval_exit0_top1'] = 70.0 + result['seed']
    text = format_tables([SMALL], results, list(METHODS))
    line = next(line for line in text.splitlines() if line.startswith('Seeds whose chosen epoch'))
    assert line.endswith(
        'on the images that chose: `ce` 0: main 80.00; `eed-kl` 0: exit 0 70.00, main 80.00; `ce` 1: main 80.00;'
        ' `eed-kl` 1: exit 0 71.00, main 80.00.'
    )
    assert format_summary([SMALL], results).count('\n') == 2  # the pair of seed 2 is not enough
    frozen = {'regime': 'frozen'}, {'freeze-backbone': True}  # its heads learn by the loss from the first epoch
    for flags in ({'head-warmup-epochs': 0.0}, *frozen):
        others = [{**result, 'flags': {**result['flags'], **flags}} for result in results]
        assert 'Seeds whose' not in format_tables([SMALL], others, list(METHODS))


def test_methods_whose_epochs_are_chosen_by_other_metrics_are_named(results):
    assert '. Epoch chosen by top1 on 5000 images held out of train.' in format_tables([SMALL], results, list(METHODS))
    for result in results:
        if result['method'] != 'plain':
            result['selection'] = {**result['selection'], 'by': 'mean_top1'}
    text = format_tables([SMALL], results, list(METHODS))
    for methods, metric in (('`ce`, `eed-kl`', 'mean_top1'), ('`plain`', 'top1')):
        assert f'. Epoch of {methods} chosen by {metric} on 5000 images held out of train.' in text


def test_plan_without_results_takes_one_line():
    assert format_tables([SMALL], [], list(METHODS)).count('\n') == 1


def test_results_of_other_images_or_flags_do_not_come_into_one_table(results):
    results[0]['num_samples'] = 5000
    with pytest.raises(MultiExitError, match='differ in num_samples'):
        format_tables([SMALL], results, list(METHODS))
    results[0] = make_result('plain', 0, extra=['--lr', '0.7'], main=80.0)
    with pytest.raises(MultiExitError, match='differ in extra'):
        format_tables([SMALL], results, list(METHODS))


def test_pairs_are_of_one_precision(results):
    results[0] = make_result('plain', 0, extra=['--amp', '--workers', '4'], main=90.0)
    text = format_tables([SMALL], results, list(METHODS))
    assert '. 1 run (seeds 0) with `--amp`, which no pair mixes with others.' in text
    assert '| `plain` | 3 |' in text
    # Seeds 1 and 2 alone: 81.7 - 81.0 and 81.15 - 80.5.
    assert paired(results, 'eed-kl', 'plain', 'main') == pytest.approx([0.7, 0.65])


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
    others = [read_plan(path) for path in PLANS if path.stem != 'small']
    assert len(others) == 11
    expected = format_tables([SMALL, *others], results, list(METHODS))  # what was measured comes first
    summary = format_summary([SMALL, *others], results)
    (tmp_path / 'docs').mkdir()
    files = {tmp_path / 'README.md': summary, tmp_path / 'docs/results.md': expected}
    for file in files:
        file.write_text(f'# A\n{START}\nold\n{END}\nrest\n')
    assert run_script(table.main, *flags, '--readme', tmp_path) == (0, '', '')
    for file, text in files.items():
        assert file.read_text() == f'# A\n{START}\n{text}{END}\nrest\n'
    results[0]['flags'] = results[0]['flags'] | {'lr': 0.7}
    (tmp_path / 'results' / f'{results[0]["name"]}.json').write_text(json.dumps(results[0]))
    code, out, err = run_script(table.main, *flags)
    assert (code, out) == (2, '')
    assert 'was made with lr 0.7, the plan says 0.1' in err


def test_readme_and_docs_have_the_tables_that_the_script_gives():
    tables, summary = load_script('table').make_tables([], EXPERIMENTS / 'results')
    for name, expected in (('README.md', summary), ('docs/results.md', tables)):
        text = (ROOT / name).read_text(encoding='utf-8')
        assert place_in(text, expected) == text


def test_summary_has_a_row_for_each_method_of_eed_that_has_pairs(results):
    text = format_summary([SMALL], results)
    assert text.count('\n') == 3
    row = '| `cifar_resnet8`, `cifar10`, `short16` | 80.50 ± 0.50 | `eed-kl` | 3 '
    assert row + '| +0.68 ± 0.07, above 0 | +0.52 ± 0.19, above 0 |' in text


def test_summary_says_how_many_pairs_each_difference_has():
    results = read_results(EXPERIMENTS / 'results')
    plan = read_plan(EXPERIMENTS / 'plans/imagenette.yaml')
    assert '| `eed-kl-narrow` | 5 |' in format_summary([plan], results)
    results = [result for result in results if not result['name'].endswith('ce-narrow-s4')]
    assert '| `eed-kl-narrow` | 5, 4 |' in format_summary([plan], results)


def test_folder_without_results_changes_nothing(tmp_path, run_script):
    (tmp_path / 'README.md').write_text('as it was')
    code, out, error = run_script(load_script('table').main, '--results', tmp_path / 'none', '--readme', tmp_path)
    assert (code, out, error) == (2, '', f'table.py: error: {tmp_path}/none holds no results.\n')
    assert (tmp_path / 'README.md').read_text() == 'as it was'


def test_difference_that_is_not_resolved_says_what_resolving_it_takes(results):
    # Differences 0, 1, 2: 18 pairs of two runs of 10 minutes resolve 0.5 points, 3 of them are there.
    mains = iter((80.2, 82.1, 82.7))
    for result in results:
        if result['method'] == 'eed-kl':
            result['classifiers'][1]['top-1'] = next(mains)
    text = format_tables([SMALL], results, list(METHODS))
    assert '| `eed-kl` - `ce` | 3 | +1.00 ± 0.00, above 0 | +1.00 ± 2.48, not resolved | ' in text
    assert '| 15 more pairs, 300 minutes |' in text


def test_plans_without_results_are_one_line(results):
    plans = [read_plan(path) for path in PLANS]
    last = format_tables(plans, results, list(METHODS)).splitlines()[-1]
    assert last.startswith('Plans that have not been run: `bottleneck` (18 runs), ')
    assert last.count('runs)') == len(plans) - 1
