"""Trackers: TensorBoard and Weights & Biases."""

import importlib.util
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from timm_multiexit.training import trackers
from timm_multiexit.training.summary import Summary
from timm_multiexit.training.trackers import (
    TrackerConfig,
    check_trackers,
    flatten_config,
    log_epoch,
    log_step,
    start_trackers,
)
from timm_multiexit.utils.errors import MultiExitError

RECORD = {'lr': 0.1, 'ratio': [0.75, 1.5], 'seed': None, 'opt_kwargs': {}}


def test_a_tracker_must_be_known_and_installed(monkeypatch):
    check_trackers(None)
    check_trackers([])
    with pytest.raises(MultiExitError, match=r"^--log-with must be tensorboard or wandb, got 'mlflow'\.$"):
        check_trackers(['mlflow'])
    monkeypatch.setitem(trackers.TRACKERS, 'wandb', lambda: False)
    with pytest.raises(
        MultiExitError,
        match=r'^--log-with wandb needs wandb\. Install it with pip install "timm-multiexit\[wandb\]"\.$',
    ):
        check_trackers(['wandb'])


def test_config_becomes_scalars_and_text():
    config = {'a': True, 'b': 1, 'c': 0.5, 'd': 'x', 'e': None, 'f': [1, 2], 'g': {'h': 1}, 'i': Path('j')}
    assert flatten_config(config) == {
        **{'a': True, 'b': 1, 'c': 0.5, 'd': 'x'},
        **{'e': 'None', 'f': '[1, 2]', 'g': "{'h': 1}", 'i': 'j'},
    }


def needs(package):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f'{package} is not installed')


def start(accelerator, folder, *names, step=0, resume_id=None):
    config = TrackerConfig(names, project='digits', tags=['eed'], resume_id=resume_id)
    start_trackers(accelerator, config, folder, record=RECORD, step=step)


def test_without_trackers_logging_does_nothing(tmp_path):
    accelerator = Accelerator(cpu=True)
    start(accelerator, tmp_path)
    log_step(accelerator, {'loss': 1.0}, 0)
    log_epoch(accelerator, {'epoch': 0}, 0)
    accelerator.end_training()
    assert list(tmp_path.iterdir()) == []


def test_another_process_than_the_main_one_starts_no_tracker(tmp_path):
    accelerator = Namespace(is_main_process=False, trackers=[])
    start(accelerator, tmp_path, 'tensorboard')
    assert list(tmp_path.iterdir()) == []


def read_scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()['scalars']}


@needs('tensorboard')
def test_tensorboard_holds_steps_and_epochs_by_number_of_updates(tmp_path):
    accelerator = Accelerator(cpu=True)
    start(accelerator, tmp_path, 'tensorboard')
    log_step(accelerator, {'loss': torch.tensor(2.0), 'exit0_top1': 25.0}, 4)
    log_step(accelerator, {'loss': 1.0, 'exit0_top1': 50.0}, 8)
    summary = Summary()
    summary.add(0, {'loss': 1.5}, {'top1': 75.0, 'exit0_top1': 62.5}, lr=0.5)
    log_epoch(accelerator, summary.rows[0], 10)
    accelerator.end_training()
    assert read_scalars(tmp_path / 'tensorboard') == {
        'train_step/loss': [(4, 2.0), (8, 1.0)],
        'train_step/exit0_top1': [(4, 25.0), (8, 50.0)],
        'train/epoch': [(10, 0.0)],
        'train/loss': [(10, 1.5)],
        'train/lr': [(10, 0.5)],
        'eval/top1': [(10, 75.0)],
        'eval/exit0_top1': [(10, 62.5)],
    }


@needs('tensorboard')
def test_a_run_that_goes_on_hides_what_was_logged_after_its_checkpoint(tmp_path):
    for begin, values in ((0, {5: 1.0, 10: 2.0, 15: 3.0}), (10, {12: 4.0, 17: 5.0})):
        if begin:
            time.sleep(1.1)  # event files are read in the order of their names, which hold seconds
        accelerator = Accelerator(cpu=True)
        start(accelerator, tmp_path, 'tensorboard', step=begin)
        for step, value in values.items():
            log_step(accelerator, {'loss': value}, step)
        accelerator.end_training()
    assert read_scalars(tmp_path / 'tensorboard')['train_step/loss'] == [(5, 1.0), (10, 2.0), (12, 4.0), (17, 5.0)]


@pytest.fixture
def offline_wandb(monkeypatch, tmp_path):
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))


@needs('wandb')
def test_wandb_offline_writes_a_run_with_the_given_id(tmp_path, offline_wandb):
    accelerator = Accelerator(cpu=True)
    start(accelerator, tmp_path, 'wandb', resume_id='abc123')
    run = accelerator.get_tracker('wandb', unwrap=True)
    assert (run.project, run.name, run.tags, run.id) == ('digits', tmp_path.name, ('eed',), 'abc123')
    assert (run.config['lr'], run.config['ratio']) == (0.1, '[0.75, 1.5]')
    log_step(accelerator, {'loss': 2.0}, 4)
    log_epoch(accelerator, {'epoch': 0, 'eval_top1': 75.0}, 4)
    accelerator.end_training()
    importlib.import_module('wandb').teardown()  # its service closes the file a moment after the run has finished
    (file,) = tmp_path.glob('wandb/offline-run-*/run-abc123.wandb')
    content = file.read_bytes()
    assert b'train_step/loss' in content
    assert b'eval/top1' in content


@needs('wandb')
def test_wandb_that_does_not_start_is_one_line_and_leaves_nothing_to_finish(tmp_path, offline_wandb):
    accelerator = Accelerator(cpu=True)
    with pytest.raises(MultiExitError, match=r'^--log-with wandb did not start: .*WANDB_MODE=offline\.$') as error:
        start(accelerator, tmp_path, 'wandb', resume_id='a/b')
    assert '\n' not in str(error.value)
    accelerator.end_training()
