"""timm-multiexit analyze: the data that flags and runs name."""

from pathlib import Path

import pytest
import torch

import timm_multiexit as tme
from timm_multiexit.analysis.measuring import AnalysisData
from timm_multiexit.analysis.runs import Run
from timm_multiexit.analysis.study import Study
from timm_multiexit.cli.analyze import complete_args, create_analyze_parser
from timm_multiexit.utils.errors import DataError


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
    run = Run('a', Path('a'), args | own, [], {})
    completed = complete_args(create_analyze_parser().parse_args(['a', *argv]), run)
    assert (completed.dataset, completed.data_dir, completed.split) == expected


def test_runs_without_any_split_need_one_named():
    run = Run('a', Path('a'), {'data_dir': 'a', 'dataset': '', 'test_split': None, 'val_split': ''}, [], {})
    with pytest.raises(tme.MultiExitError, match='Give one with --split'):
        complete_args(create_analyze_parser().parse_args(['a']), run)


def test_failed_analysis_leaves_no_folder(tmp_path, monkeypatch):
    """A folder that was there, and what is in it, stays."""

    def fail(study):
        assert study.out.is_dir()
        raise DataError('no images')

    monkeypatch.setattr(Study, '_run', fail)
    run = Run('a', tmp_path, {'seed': 0, 'exit_loss': 'ce', 'exits': 'auto', 'task': 'classification'}, [], {})
    data = AnalysisData('digits', 'test', lambda in_chans: None, lambda dataset, config: None)
    (tmp_path / 'old').mkdir()
    for out in ('new', 'deep/er/new', 'old'):
        with pytest.raises(DataError, match='no images'):
            Study([run], data, tmp_path / out, device=torch.device('cpu')).run()
    assert [path.name for path in tmp_path.iterdir()] == ['old']
    (tmp_path / 'file').touch()
    with pytest.raises(tme.MultiExitError, match='^--out must be the path of a folder, got the file .*/file'):
        Study([run], data, tmp_path / 'file', device=torch.device('cpu')).run()
