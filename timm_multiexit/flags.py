"""timm's command-line flags as data: names, types and defaults of its `train.py`, in our words.

Source: huggingface/pytorch-image-models train.py 1.0.29.dev0, and what the README and tests of 1.0.31 name since.
"""

import argparse
from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, NoReturn

from timm.loss import LOSS_TYPES
from timm.utils import ParseKwargs


@dataclass(frozen=True)
class Flag:
    """One flag: its names with spaces between (without dashes: an argument by position), and what argparse is told."""

    names: str
    type: Any
    default: Any
    metavar: str | None
    help: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def dest(self) -> str:
        """Name of the flag's attribute: that of its first long name, if no other is given."""
        long = next((name for name in self.names.split() if name.startswith('--')), self.names)
        return self.options.get('dest', long.removeprefix('--').replace('-', '_'))


class KwargsAction(ParseKwargs):
    """timm's action for `KEY=VALUE ...`, with a clear error where the sign is missing."""

    def __call__(self, parser, namespace, values, option_string=None):
        """Store the pairs as a dict."""
        wrong = [value for value in values if value and '=' not in value]
        if wrong:
            raise argparse.ArgumentError(self, f"'{wrong[0]}' is no KEY=VALUE")
        super().__call__(parser, namespace, values, option_string)


class ScriptParser(argparse.ArgumentParser):
    """A parser whose errors are one line, and name the nearest flag for one that there is not."""

    def parse_args(self, args=None, namespace=None):
        """Return the arguments, or end the program with code 2."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = next((item for item in unknown if item.startswith('-')), None)
            if name is None:
                self.error(f"no flag takes '{unknown[0]}': put values with spaces in quotes.")
            flags = [option for action in self._actions for option in action.option_strings]
            nearest = get_close_matches(name.split('=')[0], flags, n=1)
            self.error(
                f"there is no flag '{name}', " + (f'nearest is {nearest[0]}.' if nearest else '--help lists the flags.')
            )
        return parsed

    def error(self, message: str) -> NoReturn:
        """Print one line and end the program with code 2."""
        self.exit(2, f'{self.prog}: error: {" ".join(message.split())}\n')


def value(names: str, type: Any, default: Any, metavar: str | None, help: str, **options: Any) -> Flag:
    """Return a flag that takes a value, or several with `nargs`."""
    return Flag(names, type, default, metavar, help, options)


def switch(names: str, help: str) -> Flag:
    """Return a flag that is on when given."""
    return Flag(names, None, False, None, help, {'action': 'store_true'})


def pairs(names: str, help: str) -> Flag:
    """Return a flag that takes KEY=VALUE any number of times."""
    return Flag(names, None, {}, None, help, {'action': KwargsAction, 'nargs': '*', 'metavar': 'KEY=VALUE'})


def add_flags(parser: argparse.ArgumentParser, title: str, flags: Iterable[Flag]) -> None:
    """Add flags to a parser under one title; defaults that say something go into the help.

    >>> parser = ScriptParser()
    >>> add_flags(parser, 'Some', [value('-b --batch-size', int, 128, 'N', 'images'), switch('--amp', 'less precise')])
    >>> parser.parse_args(['-b', '4'])
    Namespace(batch_size=4, amp=False)
    """
    group = parser.add_argument_group(title)
    exclusive = None
    for flag in flags:
        shown = flag.default if isinstance(flag.default, list) else [flag.default]
        text = f'{flag.help} (default: {" ".join(map(_shortest, shown))})' if flag.default else flag.help
        options = {'default': copy(flag.default), 'help': text.replace('%', '%%'), **flag.options}
        if options.get('action', 'extend') == 'extend':
            options |= {'type': flag.type, 'metavar': None if 'choices' in options else flag.metavar}
        owner = group
        if flag.dest in ('torchscript', 'torchcompile'):
            owner = exclusive = exclusive or group.add_mutually_exclusive_group()
        owner.add_argument(*flag.names.split(), **options)


def _shortest(default: Any) -> str:
    return f'{default:.4g}' if isinstance(default, float) else str(default)


TASKS = ('classification', 'multilabel')
_SCALES = ('none', 'sqrt', 'linear')

# The defaults of --decay-epochs, --smoothing and --eval-metric depend on --sched and --task: see `arguments`.
TIMM_FLAGS: dict[str, tuple[Flag, ...]] = {
    'Data': (
        value('data', str, None, 'DIR', 'data folder (deprecated, use --data-dir)', nargs='?'),
        value('--data-dir', str, None, 'DIR', 'data folder, holding SPLIT/CLASS/IMAGE'),
        value('--dataset', str, '', 'NAME', "timm data set TYPE/NAME, or 'digits'"),
        value('--train-split', str, 'train', 'NAME', 'split to train on'),
        value('--val-split', str, 'validation', 'NAME', 'split evaluated after every epoch'),
        value('--train-num-samples', int, None, 'N', 'images to train on, for streams that do not say'),
        value('--val-num-samples', int, None, 'N', 'images to evaluate on, for streams that do not say'),
        switch('--dataset-download', 'let torch/ and tfds/ data sets download'),
        value('--class-map', str, '', 'FILE', 'file of class names in index order'),
        value('--input-img-mode', str, None, 'MODE', 'PIL mode of the images, if not RGB (or L for one channel)'),
        value('--input-key', str, None, 'KEY', 'field of a sample that holds the image'),
        value('--target-key', str, None, 'KEY', 'field that holds the class, or a,b,c: one field per class'),
        switch('--dataset-trust-remote-code', "let a Hugging Face data set run its repository's code"),
        value('--target-format', str, None, None, 'how a multi-label target is given', choices=('indices', 'multihot')),
    ),
    'Model': (
        value('--model', str, 'resnet50', 'NAME', 'timm name or local-dir:FOLDER'),
        switch('--pretrained', 'start from trained weights'),
        value('--pretrained-path', str, None, 'PATH', 'take these as the trained weights, fitted to the model'),
        value('--initial-checkpoint', str, '', 'PATH', 'weights to start from'),
        value('--resume', str, '', 'PATH', "checkpoint of a run to go on with; auto: --experiment's own, if any"),
        switch('--no-resume-opt', 'resume without the optimizer state'),
        value('--num-classes', int, None, 'N', "classes, if not the data set's, else the model's"),
        value('--gp', str, None, 'POOL', 'global pooling: fast, avg, max, avgmax, avgmaxc'),
        value('--img-size', int, None, 'N', "pixels along a side, if not the model's"),
        value('--in-chans', int, None, 'N', 'image channels, if not 3'),
        value('--input-size', int, None, 'N', 'channels height width', nargs=3),
        value('--crop-pct', float, None, 'F', 'centre crop for evaluation, as a fraction'),
        value('--mean', float, None, 'M', 'channel means', nargs='+'),
        value('--std', float, None, 'S', 'channel standard deviations', nargs='+'),
        value('--interpolation', str, '', 'NAME', "resize for evaluation, if not the model's"),
        value('-b --batch-size', int, 128, 'N', 'training images per process and batch'),
        value('-vb --validation-batch-size', int, None, 'N', 'the same for evaluation, if not --batch-size'),
        switch('--channels-last', 'channels_last memory format'),
        value('--fuser', str, '', 'NAME', 'not in this script'),
        value('--grad-accum-steps', int, 1, 'N', 'batches per optimizer step'),
        switch('--grad-checkpointing', 'recompute activations in backward'),
        switch('--fast-norm', 'norms in low precision under --amp'),
        pairs('--model-kwargs', 'keywords for the model'),
        value('--head-init-scale', float, None, 'F', 'factor of the fresh classifier weights'),
        value('--head-init-bias', float, None, 'F', 'value of the fresh classifier biases'),
        value('--torchcompile-mode', str, None, 'MODE', "torch.compile's mode"),
        switch('--torchscript', 'not in this script'),
        value('--torchcompile', str, None, 'BACKEND', 'torch.compile, by inductor', nargs='?', const='inductor'),
    ),
    'Device': (
        value('--device', str, 'cuda', 'NAME', 'cuda: what Accelerate finds; cpu: the CPU anyway'),
        switch('--amp', 'mixed precision'),
        value('--amp-dtype', str, 'float16', 'TYPE', 'its type, float16 or bfloat16'),
        value('--model-dtype', str, None, 'TYPE', 'type of the weights without --amp, if not float32'),
        switch('--no-ddp-bb', 'no buffer broadcast in DDP'),
        switch('--synchronize-step', 'wait for the GPU after every step'),
        value('--local_rank', int, 0, 'N', 'taken for old launchers and not used'),
        value('--device-modules', str, None, 'NAME', 'Python modules of device backends to import', nargs='+'),
    ),
    'Optimizer': (
        value('--opt', str, 'sgd', 'NAME', 'timm optimizer'),
        value('--opt-eps', float, None, 'E', "epsilon, if not the optimizer's"),
        value('--opt-betas', float, None, 'B', "betas, if not the optimizer's", nargs='+'),
        value('--momentum', float, 0.9, 'M', 'momentum'),
        value('--weight-decay', float, 2e-5, 'W', 'weight decay'),
        value('--clip-grad', float, None, 'V', 'bound for gradients'),
        value('--clip-mode', str, 'norm', 'MODE', 'what is bounded: norm, value or agc'),
        value('--layer-decay', float, None, 'D', 'learning rate factor from layer to layer'),
        value('--layer-decay-min-scale', float, 0, 'S', 'its lower bound'),
        value('--layer-decay-no-opt-scale', float, None, 'S', 'layers below it do not train'),
        pairs('--opt-kwargs', 'keywords for the optimizer'),
    ),
    'Learning rate': (
        value('--sched', str, 'cosine', 'NAME', 'cosine, tanh, step, multistep, poly, wsd, rsqrt, constant, none'),
        switch('--sched-on-updates', 'step it on every update'),
        value('--lr', float, None, 'LR', 'learning rate; overrides --lr-base'),
        value('--lr-base', float, 0.1, 'LR', 'lr = base * global batch / base size'),
        value('--lr-base-size', int, 256, 'N', 'that base size'),
        value('--lr-base-scale', str, '', 'S', 'linear or sqrt, if not by optimizer'),
        value('--lr-noise', float, None, 'F', 'where noise goes on and off, as fractions of the run', nargs='+'),
        value('--lr-noise-pct', float, 0.67, 'F', 'bound of the noise'),
        value('--lr-noise-std', float, 1.0, 'S', 'its standard deviation'),
        value('--lr-cycle-mul', float, 1.0, 'F', 'each cycle is so much longer than the last'),
        value('--lr-cycle-decay', float, 0.5, 'F', 'and its rate so much lower'),
        value('--lr-cycle-limit', int, 1, 'N', 'number of cycles'),
        value('--lr-k-decay', float, 1.0, 'K', 'k-decay of cosine and poly'),
        value('--lr-decay-fn', str, None, 'NAME', 'how wsd and rsqrt decay: linear, 1-sqrt, cosine, power, exp'),
        value('--lr-stable-timescale', float, None, 'N', 'timescale of rsqrt in epochs, if not the warm-up'),
        value('--warmup-lr', float, 1e-5, 'LR', 'rate that the warm-up starts from'),
        value('--min-lr', float, 0, 'LR', 'rate that schedules end at'),
        value('--epochs', int, 300, 'N', 'epochs of the schedule'),
        value('--stop-epoch', int, None, 'N', 'stop after so many, with the schedule as it is'),
        value('--epoch-repeats', float, 0.0, 'N', 'times that a stream is repeated in an epoch'),
        value('--start-epoch', int, None, 'N', 'first epoch, if not 0 or where the resumed run was'),
        value('--decay-milestones', int, [90, 180, 270], 'N', 'epochs where multistep decays', nargs='+'),
        value('--decay-epochs', float, 90, 'N', 'epochs between decays; wsd and rsqrt: of the decay, 0.2 of all'),
        value('--warmup-epochs', int, 5, 'N', 'epochs of warm-up'),
        switch('--warmup-prefix', 'warm-up comes before the schedule'),
        value('--cooldown-epochs', int, 0, 'N', 'epochs at the lowest rate, after the schedule'),
        value('--patience-epochs', int, 10, 'N', 'of the plateau schedule'),
        value('--decay-rate --dr', float, 0.1, 'F', 'factor of a decay'),
    ),
    'Augmentation and regularization': (
        switch('--no-aug', 'no training augmentation'),
        value('--train-crop-mode', str, None, 'MODE', 'rrc, rkrc or rkrr'),
        value('--scale', float, [0.08, 1.0], 'F', 'area of random crops', nargs='+'),
        value('--ratio', float, [3 / 4, 4 / 3], 'F', 'aspect of random crops', nargs='+'),
        value('--hflip', float, 0.5, 'P', 'chance of a horizontal flip'),
        value('--vflip', float, 0.0, 'P', 'chance of a vertical flip'),
        value('--color-jitter', float, 0.4, 'F', 'strength of colour jitter'),
        value('--color-jitter-prob', float, None, 'P', 'its chance'),
        value('--grayscale-prob', float, None, 'P', 'chance of losing all colour'),
        value('--gaussian-blur-prob', float, None, 'P', 'chance of a blur'),
        value('--aa', str, None, 'POLICY', 'AutoAugment, RandAugment, AugMix policy'),
        value('--aug-repeats', float, 0, 'N', 'versions of an image per epoch, for several processes'),
        value('--aug-splits', int, 0, 'N', 'versions of an image per batch, 0 or from 2'),
        value('--reprob', float, 0.0, 'P', 'chance of random erasing'),
        value('--remode', str, 'pixel', 'MODE', 'what erases: const, rand or pixel'),
        value('--recount', int, 1, 'N', 'erased patches'),
        switch('--resplit', 'erase in the first split too'),
        value('--mixup', float, 0.0, 'A', 'mixup alpha, 0: off'),
        value('--cutmix', float, 0.0, 'A', 'cutmix alpha, 0: off'),
        value('--cutmix-minmax', float, None, 'F', 'cutmix ratios, instead of alpha', nargs='+'),
        value('--mixup-prob', float, 1.0, 'P', 'chance of mixing a batch'),
        value('--mixup-switch-prob', float, 0.5, 'P', 'chance of cutmix where both are on'),
        value('--mixup-mode', str, 'batch', 'MODE', 'batch, pair or elem; half with the prefetcher'),
        value('--mixup-off-epoch', int, 0, 'N', 'no mixing from this epoch on, 0: always'),
        value('--smoothing', float, 0.1, 'F', 'label smoothing; for multilabel: 0'),
        value('--train-interpolation', str, 'random', 'NAME', 'resize in training'),
        value('--drop', float, 0.0, 'P', 'dropout'),
        value('--drop-connect', float, None, 'P', 'deprecated, use --drop-path'),
        value('--drop-path', float, None, 'P', 'stochastic depth'),
        value('--drop-block', float, None, 'P', 'DropBlock'),
    ),
    'Loss': (
        value('--task', str, TASKS[0], None, 'one label per image, or several', choices=TASKS),
        value('--multilabel-threshold', float, 0.5, 'P', 'a label is predicted from this probability on'),
        value('--loss', str, None, None, 'ce, for multilabel bce, if not given', choices=LOSS_TYPES),
        switch('--jsd-loss', 'the same as --loss jsd'),
        switch('--bce-loss', 'the same as --loss bce'),
        switch('--bce-sum', 'sum bce over classes'),
        value('--bce-target-thresh', float, None, 'P', 'soft targets above it are 1 for bce, others 0'),
        value('--bce-pos-weight', float, None, 'W', 'the same as --loss-pos-weight'),
        value('--loss-class-weight', str, None, 'W', 'a number, a,b,..., a file, inv_freq or effective_num'),
        value('--loss-pos-weight', str, None, 'W', 'of positive terms: the same, or neg_pos'),
        value('--class-stats', str, None, 'FILE', 'JSON of pos_counts and num_samples, for weights by frequency'),
        value('--loss-weight-power', float, 1.0, 'F', 'exponent of inv_freq and neg_pos'),
        value('--poly-gamma', float, 0.0, 'G', 'focusing of poly, for multilabel'),
        value('--poly-epsilon', float, 2.0, 'E', 'coefficient of poly'),
    ),
    'Batch norm': (
        value('--bn-momentum', float, None, 'M', "momentum, if not the model's"),
        value('--bn-eps', float, None, 'E', "epsilon, if not the model's"),
        switch('--sync-bn', 'statistics over all processes'),
        value('--dist-bn', str, 'reduce', 'HOW', "after an epoch: broadcast, reduce or ''"),
        switch('--split-bn', 'statistics of their own for each augmentation split'),
    ),
    'Moving average': (
        switch('--model-ema', 'keep and evaluate a moving average of the weights'),
        switch('--model-ema-force-cpu', 'keep it on the CPU'),
        value('--model-ema-decay', float, 0.9998, 'D', 'its decay'),
        switch('--model-ema-warmup', 'let its decay rise from 0'),
    ),
    'Run': (
        value('--seed', int, 42, 'S', 'seed of all randomness'),
        value('--worker-seeding', str, 'all', 'MODE', 'all or part; no effect here, every sample has a seed'),
        value('--log-interval', int, 50, 'N', 'batches between log lines'),
        value('--val-interval', int, 1, 'N', 'epochs between evaluations'),
        value('--recovery-interval', int, 0, 'N', 'batches between recovery checkpoints, 0: none'),
        value('--checkpoint-hist', int, 10, 'N', 'checkpoints kept'),
        value('--save-epochs', int, None, 'N', 'keep milestone-N.pth.tar after these many epochs', nargs='+'),
        value('-j --workers', int, 4, 'N', 'data loading processes'),
        switch('--save-images', 'save a batch of images every --log-interval'),
        switch('--pin-mem', 'pin host memory for transfers'),
        switch('--no-prefetcher', 'leave out the prefetcher'),
        value('--output', str, '', 'DIR', 'folder of runs, if not output/train'),
        value('--experiment', str, '', 'NAME', 'folder in --output, if not named by time and model'),
        value('--eval-metric', str, 'top1', 'M', 'column of summary.csv, without eval_, that chooses the best epoch'),
        value('--tta', int, 0, 'N', 'not in this script'),
        switch('--use-multi-epochs-loader', 'keep loading processes between epochs'),
        switch('--log-wandb', 'the same as --log-with wandb'),
        value('--wandb-project', str, None, 'NAME', 'project in wandb'),
        value('--wandb-tags', str, [], 'TAG', 'tags in wandb', nargs='+'),
        value('--wandb-resume-id', str, '', 'ID', 'run in wandb to go on with'),
    ),
    'Scheduled image sizes': (
        value('--train-img-sizes', int, None, 'N', 'sides of training images, one of them for each batch', nargs='+'),
        value('--train-batch-sizes', int, None, 'N', 'batch size for each, if not --batch-size', nargs='+'),
        value('--train-size-probs', float, None, 'P', 'weight of each, if not equal', nargs='+'),
        value('--train-size-schedule', str, 'constant', None, 'of the sizes', choices=('constant', 'progressive')),
        value('--train-size-schedule-spread', float, 0.65, 'F', 'how far progressive strays, in places of the list'),
        value('--train-size-random-mix', float, 0.1, 'P', 'share of any size in progressive'),
        value('--train-batches-per-epoch --train-steps-per-epoch', int, None, 'N', 'batches, if not by the data'),
        value('--variable-batch-loss-scale', str, 'none', None, 'of the loss by batch size', choices=_SCALES),
    ),
    "NaFlex, for timm's own train.py": (
        switch('--naflex-loader', 'not in this script'),
        value('--naflex-train-seq-lens', int, [128, 256, 576, 784, 1024], 'N', 'tokens in training', nargs='+'),
        value('--naflex-max-seq-len', int, 576, 'N', 'tokens in evaluation'),
        value('--naflex-patch-sizes', int, None, 'N', 'patch sizes', nargs='+'),
        value('--naflex-patch-size-probs', float, None, 'P', 'chance of each', nargs='+'),
        value('--naflex-loss-scale', str, 'linear', None, 'of the loss by batch size', choices=_SCALES),
        switch('--naflex-patchify-channels-first', 'channels before pixels in a patch'),
    ),
    'Distillation from another model': (
        value('--kd-model-name', str, None, 'NAME', 'timm model that teaches'),
        value('--kd-distill-type', str, 'logit', None, 'what it teaches', choices=('logit', 'feature', 'token')),
        value('--kd-loss-type', str, 'kl', 'NAME', 'distance of outputs, kl'),
        value('--distill-loss-weight', float, None, 'W', 'of the distance; 1, or 1 - the other weight'),
        value('--task-loss-weight', float, None, 'W', 'of the task, 1 if not given'),
        value('--kd-temperature', float, 4.0, 'T', 'temperature of kl'),
        value('--kd-student-feature-dim', int, None, 'N', "width of the model's features"),
        value('--kd-teacher-feature-dim', int, None, 'N', "width of the teacher's features"),
        value('--kd-token-distill-type', str, 'soft', None, 'of the token', choices=('soft', 'hard')),
    ),
}
