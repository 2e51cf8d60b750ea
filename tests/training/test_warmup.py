"""Fresh heads on a trained network: what main goes through while they join."""

import pytest
from accelerate.state import AcceleratorState

from timm_multiexit.cli import train
from timm_multiexit.cli.flags.train_args import parse_train_args
from timm_multiexit.cli.launch import create_accelerator
from timm_multiexit.evaluation.exit_table import evaluate_loader

LOSSES = {
    'ce': ('--exit-loss', 'ce'),
    'eed-kl': ('--eed',),
    'eed-mse': ('--eed', '--exit-output-loss', 'mse'),
}


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A checkpoint of the plain network that the demonstration trains, at 98 % or more."""
    folder = tmp_path_factory.mktemp('plain')
    argv = ('--epochs', '6', '--output', folder, '--experiment', 'plain')
    AcceleratorState._reset_state(reset_partial_state=True)
    assert train.main([str(arg) for arg in argv]) == 0
    return folder / 'plain' / 'last.pth.tar'


def lowest_main(trained, folder, *flags, epochs):
    """Return main's top-1 on 180 images before training, and its lowest after any step of each epoch."""
    AcceleratorState._reset_state(reset_partial_state=True)
    argv = ('--initial-checkpoint', trained, '--output', folder, '--experiment', 'run', '--stop-epoch', epochs, *flags)
    args = parse_train_args([str(arg) for arg in argv])
    accelerator = create_accelerator(args)
    run = train.build_run(args, accelerator)
    run.open()
    measured = [[] for _ in range(args.epochs)]

    def measure(trainer=None):
        metrics = evaluate_loader(run.task.trainable_module, run.data.val_loader, accelerator=accelerator).metrics
        if trainer is not None:
            measured[trainer.epoch].append(metrics['main']['top1'])
        return metrics['main']['top1']

    start = measure()
    run.trainer.on_update = measure
    run.fit()
    assert [len(values) for values in measured[:epochs]] == [19] * epochs
    return start, [min(values) for values in measured[:epochs]]


@pytest.mark.slow
@pytest.mark.parametrize('name', LOSSES)
def test_main_stays_within_a_point_of_its_start_while_fresh_heads_join(name, trained, tmp_path):
    start, lowest = lowest_main(trained, tmp_path, *LOSSES[name], '--lr', '2e-4', epochs=2)
    assert start >= 98
    assert lowest[0] == start  # the heads alone
    assert lowest[1] >= start - 1.0  # the backbone joins


@pytest.mark.slow
def test_main_falls_without_the_warm_up_of_the_heads(trained, tmp_path):
    flags = (*LOSSES['eed-mse'], '--head-warmup-epochs', '0')
    start, lowest = lowest_main(trained, tmp_path, *flags, epochs=1)
    assert lowest[0] <= start - 5.0
