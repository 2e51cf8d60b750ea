"""Runs: their names, methods, teachers and reference."""

from pathlib import Path

import pytest

from timm_multiexit.analysis.runs import Run, name_folders, name_method, teacher_members


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
    assert teacher_members({'exits': 'auto', 'exit_teacher': None, **values}, 2) == pytest.approx(members)


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
    assert name_method({'exits': 'auto', **values}) == name


def test_runs_are_named_by_what_tells_them_apart():
    assert name_folders([Path('/a/b/c')]) == ['c']
    assert name_folders([Path('/a/x/c'), Path('/b/x/c'), Path('/a/x/d')]) == ['a/x/c', 'b/x/c', 'a/x/d']


def test_what_epochs_were_evaluated_on_is_said():
    args = {'val_split': 'validation', 'train_split': 'train'}
    runs = [Run('a', Path('a'), args | {'val_from_train': number}, [], {}) for number in (None, 50)]
    assert [run.curve_split for run in runs] == ['validation', '50 images held out of train']
