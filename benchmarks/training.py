"""What training costs: every loss against plain timm, and the loop of `train.py` against its bare step."""

import statistics
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, count, cycle
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from timm_multiexit.cli.build_model import create_regime, create_train_model, place_model
from timm_multiexit.cli.build_training import create_task, create_train_optimizer
from timm_multiexit.cli.flags.train_args import parse_train_args
from timm_multiexit.cli.train import build_run
from timm_multiexit.losses.multi_exit_loss import LOSSES
from timm_multiexit.utils.timing import describe_ratios, measure_peak, read_clock, time_interleaved


def create_train_args(args: Namespace, loss: str | None = None) -> Namespace:
    """Return the arguments with which `train.py` would train; without a loss, the plain model.

    Without `data_dir` the data is what it takes where none is named, images that come with an installed package. Of a
    folder it takes the images as the recipes for small ones do.
    """
    device = 'cpu' if torch.device(args.device).type == 'cpu' else 'cuda'  # train.py's word for all accelerators
    flags = f'--model {args.model} --img-size {args.img_size} --batch-size {args.batch_size} --device {device}'
    # A low rate: the weights must stay finite on noise. timm's interval between log lines, at which numbers are read.
    flags += f' --num-classes {args.num_classes} --opt sgd --lr 1e-4 --log-interval 50'
    flags += ' --amp --amp-dtype bfloat16' if args.amp else ''
    flags += ' --channels-last' if args.channels_last else ''
    flags += ' --torchcompile' if args.torchcompile else ''
    if loss:
        flags += f' --exit-loss {loss} --exit-head {args.exit_head}'
        if LOSSES[loss].get('feature_weight'):
            flags += ' --exit-projectors'
    if args.data_dir:
        flags += ' --crop-padding 4 --color-jitter 0 --cache-images'
    data_flags = ['--data-dir', args.data_dir] if args.data_dir else []
    train_args = parse_train_args([*flags.split(), '--workers', '0', *data_flags])
    if loss:
        train_args.exits = args.exits
    return train_args


def create_step(train_args: Namespace, accelerator: Accelerator) -> tuple[Callable[[Tensor, Tensor], None], nn.Module]:
    """Return the bare training step, (images, target) -> None, and its model.

    It is what PyTorch and timm do without a loop around them: no Accelerate, no seeding, no numbers for a log.
    """
    model = place_model(train_args, create_train_model(train_args, None), accelerator)
    task = create_task(train_args, model, accelerator.device).train()
    regime = create_regime(train_args, model, None)
    optimizer = create_train_optimizer(train_args, model, regime, lr=train_args.lr)
    if train_args.torchcompile:
        torch._dynamo.config.recompile_limit = 64
        model.compile(backend=train_args.torchcompile)
    layout = torch.channels_last if train_args.channels_last else torch.contiguous_format

    def step(images: Tensor, target: Tensor) -> None:
        with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=train_args.amp):
            result = task(images.contiguous(memory_format=layout), target)
        result['loss'].backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, model


def count_train_macs(model: nn.Module) -> int | None:
    """Return the MACs of a forward in training: the backbone, all heads and their projectors."""
    if not hasattr(model, 'exits'):
        return None
    projectors = [head.projector for head in model.exits if head.projector is not None]
    return model.cost()[-1].sequential.macs + sum(linear.weight.numel() for linear in projectors)


def measure_steps(
    args: Namespace,
    accelerator: Accelerator,
    batch: tuple[Tensor, Tensor],
    turn: int,
) -> list[dict[str, Any]]:
    """Return the rows of the table of bare steps: plain timm, and every loss.

    Args:
        args: Of the command line.
        accelerator: Owns the device.
        batch: Images and target.
        turn: Steps that a variant takes at a time.
    """
    device = accelerator.device
    variants, macs = {}, {}
    for name, loss in (('plain timm', None), ('plain timm again', None), *((loss, loss) for loss in args.losses)):
        step, model = create_step(create_train_args(args, loss), accelerator)
        variants[name] = partial(lambda step: [step(*batch) for _ in range(turn)], step)
        macs[name] = count_train_macs(model)
        if loss:
            total = model.cost()[-1].fixed.macs
    times = time_interleaved(variants, args.rounds, device)
    rows = []
    for name, values in times.items():
        ratio, spread = describe_ratios(values, times['plain timm'])
        macs_ratio = macs[name] / total if macs[name] else 1.0
        rows.append(
            {
                'step': name,
                'ms': 1e3 * statistics.median(values) / turn,
                'img/s': args.batch_size * turn / statistics.median(values),
                'time ratio': ratio,
                'quartiles': spread,
                'MACs ratio': macs_ratio,
                'time / MACs': ratio / macs_ratio,
                'vs ce': describe_ratios(values, times['ce'])[0] if 'ce' in times else None,
            }
        )
        if device.type == 'cuda':
            rows[-1]['MiB above weights'] = measure_peak(variants[name])
    return rows


class InterleavedLoader:
    """Batches for the loop; between its turns it takes the bare step as often.

    Args:
        batches: Endless images and targets.
        step: (images, target) -> None.
        rounds: How often loop and bare step take turns, after one round that does not count.
        turn: Batches in a turn.
        device: Where the work is done.

    Attributes:
        loop, bare: Seconds of each turn.
        waiting: Seconds of the loop's turns before its batches were there.
    """

    def __init__(
        self,
        batches: Iterator[tuple[Tensor, Tensor]],
        step: Callable[[Tensor, Tensor], None],
        *,
        rounds: int,
        turn: int,
        device: torch.device,
    ):
        self.batches, self.step, self.device = batches, step, device
        self.rounds, self.turn = rounds, turn
        self.loop: list[float] = []
        self.bare: list[float] = []
        self.waiting: list[float] = []

    def __len__(self) -> int:
        return (self.rounds + 1) * self.turn + 1

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches."""
        for round_idx in range(self.rounds + 1):
            seen, waiting = [], 0.0
            begun = read_clock(self.device)
            for _ in range(self.turn):
                asked = read_clock(self.device)
                seen.append(next(self.batches))
                waiting += read_clock(self.device) - asked
                yield seen[-1]
            looped = read_clock(self.device)
            for batch in seen:
                self.step(*batch)
            if round_idx:
                self.bare.append(read_clock(self.device) - looped)
                self.loop.append(looped - begun)
                self.waiting.append(waiting)
        yield next(self.batches)  # nobody asks for more after the last one, and the last turn would not be seen


def measure_loop(
    args: Namespace,
    accelerator: Accelerator,
    ready: list[tuple[Tensor, Tensor]],
    turn: int,
) -> list[dict[str, Any]]:
    """Return the rows of the table of the training loop, with tensors in memory and with images to prepare.

    Args:
        args: Of the command line.
        accelerator: Owns the device.
        ready: Batches of images and target.
        turn: Steps at a time.
    """
    loss = 'eed' if 'eed' in args.losses else args.losses[0]
    train_args = create_train_args(args, loss)
    # Never opened, so nothing is written.
    run = build_run(train_args, accelerator)
    if train_args.cache_images:
        for _ in run.data.train_loader.epoch(0):  # from now on every image has been decoded
            pass
    step, _ = create_step(train_args, accelerator)
    rows = []
    prepared = chain.from_iterable(run.data.train_loader.epoch(epoch) for epoch in count())
    for name, batches in (('tensors in memory', cycle(ready)), ('images, augmented, no workers', prepared)):
        loader = InterleavedLoader(batches, step, rounds=args.rounds, turn=turn, device=accelerator.device)
        run.trainer.train_epoch(0, loader)
        ratio, spread = describe_ratios(loader.loop, loader.bare)
        rows.append(
            {
                f'loop of {loss}': name,
                'bare ms': 1e3 * statistics.median(loader.bare) / turn,
                'loop ms': 1e3 * statistics.median(loader.loop) / turn,
                'time ratio': ratio,
                'quartiles': spread,
                'waiting for data, ms': 1e3 * statistics.median(loader.waiting) / turn,
                'waiting, %': 100 * sum(loader.waiting) / sum(loader.loop),
                'img/s prepared': args.batch_size * turn / statistics.median(loader.waiting) if rows else None,
            }
        )
    return rows
