"""The end of a run: the best network's table, printed and written beside it."""

import json
import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from timm_multiexit.checkpoint import hash_weights
from timm_multiexit.data import is_same_split
from timm_multiexit.engine import evaluate_loader
from timm_multiexit.factory import create_model, make_table
from timm_multiexit.files import RESUME, write_text
from timm_multiexit.loaders import create_eval_loader
from timm_multiexit.metrics import describe_environment, describe_preparation
from timm_multiexit.model import MultiExitModel
from timm_multiexit.sources import create_backbone

# timm's prefixes of names of data sets.
_READERS = ('torch', 'hfds', 'hfids', 'tfds', 'wds')
_FOLDER_READERS = ('image_folder', 'folder')


def report(
    args: Namespace,
    accelerator: Accelerator,
    folder: Path,
    dataset: Any,
    *,
    data_config: dict[str, Any],
    best_epoch: int | None,
    num_epochs: int,
) -> None:
    """Print the table of the network in `folder/best` and write it to `folder/results.json`; all ranks take part.

    Args:
        args: Of the run.
        accelerator: Of the run.
        folder: Of the run.
        dataset: What the table is of.
        data_config: How images are made ready.
        best_epoch: From 0; None where no epoch was chosen.
        num_epochs: That the run has trained.
    """
    best = load_best(args, f'{folder}/best').to(accelerator.device)
    result = evaluate_loader(
        best,
        create_eval_loader(args, dataset, data_config, accelerator),
        accelerator=accelerator,
        multi_label=args.task == 'multilabel',
        threshold=args.multilabel_threshold,
    )
    if not accelerator.is_main_process:
        return
    split = args.test_split or args.val_split
    chosen_on = args.val_split
    if args.val_from_train:
        chosen_on = f'{args.val_from_train} images held out of {args.train_split}'
    table = make_table(best, result.metrics, input_size=data_config['input_size'], num_samples=result.num_samples)
    chosen = ''
    is_same = best_epoch is not None and is_same_split(split, args.val_split) and not args.val_from_train
    if best_epoch is not None:
        chosen = f', epoch {best_epoch + 1} of {num_epochs} chosen by {args.eval_metric} on'
        chosen += ' this split' if is_same else f' {chosen_on}' if args.val_from_train else f' the {chosen_on} split'
    print(
        f'\n{args.model} on the {split} split, {table.num_samples} images{chosen}:\n\n{table}\n\n'
        f'{folder}/best is the network: create_model("local-dir:{folder}/best", pretrained=True)\n',
        flush=True,
    )
    results = {
        'split': split,
        'num_samples': table.num_samples,
        **describe_inputs(args, best, data_config, folder / 'best'),
        'epochs': num_epochs,
        'epoch_chosen_on': chosen_on,
        'epoch_chosen_by': None if best_epoch is None else args.eval_metric,
        'is_reported_split': is_same,
        'best_epoch': best_epoch,
        'rows': table.rows,
        'seed': args.seed,
        'command': sys.argv,
        **describe_environment(),
    }
    write_text(folder / 'results.json', json.dumps(results, indent=2) + '\n', advice=RESUME)


def describe_inputs(
    args: Namespace, model: MultiExitModel, data_config: dict[str, Any], folder: Path | None
) -> dict[str, Any]:
    """Return what results are of: dataset, input_size, preparation, precision, and the SHA-256 of a folder's weights.

    Args:
        args: Of the command line.
        model: What was evaluated.
        data_config: How images are made ready.
        folder: Whose weights were evaluated; None for none.
    """
    weights = {} if folder is None else {'weights': hash_weights(folder)}
    dtype = str(next(model.parameters()).dtype).removeprefix('torch.')
    return {
        'dataset': name_dataset(args),
        'input_size': list(data_config['input_size']),
        'preparation': describe_preparation(data_config),
        'precision': f'amp {args.amp_dtype}' if args.amp else dtype,
        **weights,
    }


def name_dataset(args: Namespace) -> str:
    """Return the name of the data without the reader's, that of the folder where no other is given.

    >>> name_dataset(Namespace(dataset='torch/cifar10', data_dir='data'))
    'cifar10'
    >>> name_dataset(Namespace(dataset='', data_dir='/data/imagenet/'))
    'imagenet'
    """
    name = args.dataset.partition('?')[0]
    if name.partition('/')[0].lower() in _READERS:
        name = name.partition('/')[2]
    if name.lower() in _FOLDER_READERS:
        name = ''
    # No folder of this machine: results are published.
    if not name or os.path.isabs(name):
        name = os.path.basename(os.path.abspath(name or (args.data_dir or '').partition('?')[0]))
    return name


def load_best(args: Namespace, folder: str) -> MultiExitModel:
    """Return the network of a run's folder, without exits if the run had none."""
    name = f'local-dir:{folder}'
    if args.exits is not None:
        return create_model(name, pretrained=True, **args.model_kwargs)
    return MultiExitModel(create_backbone(name, pretrained=True, **args.model_kwargs), [])
