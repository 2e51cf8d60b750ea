"""Files of results: what is kept of a run."""

import json

import pytest
from evidence.results import collect_result, is_done, read_results, write_result
from helpers.experiments import ROOT, SMALL

from timm_multiexit.utils.errors import MultiExitError


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


@pytest.mark.parametrize(('changes', 'message'), [({'seed': 7}, 'got seed 7'), ({'dataset': 'c100'}, 'and c100')])
def test_results_of_another_seed_or_data_are_refused(tmp_path, changes, message):
    run = SMALL.runs[0]
    with pytest.raises(MultiExitError, match=message):
        collect_result(run, make_folder(tmp_path / 'run', run, **changes), seconds=1)


@pytest.mark.parametrize('text', ['{', '[]', '{"format": 1}', '{"name": 1}'])
def test_file_that_is_no_result_is_refused_by_name(tmp_path, text):
    (tmp_path / 'a.json').write_text(text)
    with pytest.raises(MultiExitError, match='a.json'):
        read_results(tmp_path)
