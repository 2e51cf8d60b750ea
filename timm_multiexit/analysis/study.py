"""The study of some runs: all numbers in `analysis.json`, pictures beside it, and a table for people."""

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from timm_multiexit.analysis.architecture import draw_architecture
from timm_multiexit.analysis.curves import describe_curve, read_curve
from timm_multiexit.analysis.diversity import describe_gain
from timm_multiexit.analysis.line_figures import (
    draw_accuracy_over_macs,
    draw_diversity,
    draw_main_and_ensemble,
    draw_training,
)
from timm_multiexit.analysis.matrix_figures import draw_agreement, draw_dissimilarity
from timm_multiexit.analysis.measuring import AnalysisData, Measurer
from timm_multiexit.analysis.runs import Run, find_reference
from timm_multiexit.checkpoints.config_rules import CONFIG_NAME
from timm_multiexit.evaluation.metrics import default_metric
from timm_multiexit.utils.environment import describe_environment
from timm_multiexit.utils.errors import InvalidValueError
from timm_multiexit.utils.figures import MATPLOTLIB_MISSING, encode_png
from timm_multiexit.utils.files import RUN_AGAIN, explain_disk_errors, replacing, write_text
from timm_multiexit.utils.untrusted import read_json

_logger = logging.getLogger(__name__)

_LABELS = {'top1': 'top-1 accuracy, %', 'map': 'mean average precision, %'}
_JSON_DIGITS = 6
_ROW = re.compile(r'\[\s+(?:[-\d]|null)[^][{}"]*\]')  # a list of numbers


class Study:
    """Measures runs on some images and draws them into the folder `out`, where files of the same names are replaced.

    Gains are over the run that has the name or method `reference`; None for the first of 'ce', if there is one. The
    dissimilarity matrices are of `num_samples` images at most, which `seed` chooses.

    Raises:
        InvalidValueError: No run has the name or method of the reference, or runs are of different tasks.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        data: AnalysisData,
        out: Path,
        *,
        device: torch.device,
        reference: str | None = None,
        num_samples: int = 500,
        seed: int = 0,
    ):
        self.runs, self.data, self.out, self.device = runs, data, out, device
        self.num_samples, self.seed = num_samples, seed
        self.reference = find_reference(runs, reference)
        seeds = {run.args.get('seed') for run in runs}
        if self.reference and len(seeds) > 1:
            _logger.warning(
                f'Gains are over {self.reference.name} alone, but runs have different seeds: gains contain their noise.'
            )
        if len({run.is_multi_label for run in runs}) > 1:
            raise InvalidValueError('Cannot compare runs with one and with several classes per image. Give one kind.')
        self.metric = default_metric(runs[0].is_multi_label)
        self.draws = True

    def run(self) -> dict[str, Any]:
        """Write everything and return what `analysis.json` holds, numbers rounded to six digits after the point.

        Folders that are made for it are removed again if nothing was written.
        """
        if self.out.exists() and not self.out.is_dir():
            raise InvalidValueError(f'--out must be the path of a folder, got the file {self.out}.')
        made = [folder for folder in (self.out, *self.out.parents) if not folder.exists()]
        with explain_disk_errors(self.out, advice=RUN_AGAIN):
            self.out.mkdir(parents=True, exist_ok=True)
        try:
            return self._run()
        finally:
            with suppress(OSError):  # of folders that are not empty
                for folder in made:
                    folder.rmdir()

    def _run(self) -> dict[str, Any]:
        numbers = {run.name: self._describe(run) for run in self.runs}
        self._add_curves(numbers)
        if self.runs[0].is_multi_label:
            _logger.info('Images have several classes: only curves are drawn.')
        else:
            self._measure(numbers)
        content = {
            'dataset': self.data.name,
            'split': self.data.split,
            'reference': self.reference and self.reference.name,
            'metric': self.metric,
            'samples': self.num_samples,
            'seed': self.seed,
            'runs': numbers,
            'environment': describe_environment(),
        }
        content = {key: _rounded(item) for key, item in content.items()}
        write_text(self.out / 'analysis.json', format_json(content))
        for name, draw in figures_of_all(content).items():
            self._save(name, draw)
        return content

    def _describe(self, run: Run) -> dict[str, Any]:
        best = run.results.get('best_epoch')
        return {
            'model': run.args['model'],
            'method': run.method,
            'seed': run.args.get('seed'),
            'best_epoch': None if best is None else best + 1,
            'curve_of': run.curve_split,
        }

    def _add_curves(self, numbers: Mapping[str, dict[str, Any]]) -> None:
        curves = {run.name: read_curve(run.rows, self.metric) for run in self.runs}
        own = curves[self.reference.name]['main'] if self.reference else []
        for run in self.runs:
            name, curve = run.name, curves[run.name]
            is_alike = self.reference is not None and run.curve_split == self.reference.curve_split
            if own and not is_alike:
                _logger.warning(
                    f'{name} was evaluated on other images than the reference: its epochs are not compared.'
                )
            numbers[name]['curve'] = describe_curve(curve, own[-1] if own and is_alike else None)
            if not curve['epochs']:
                _logger.warning(f'{name} has no evaluated epoch, so its curve is left out.')

    def _measure(self, numbers: Mapping[str, dict[str, Any]]) -> None:
        measurer = Measurer(self.data, self.device, num_samples=self.num_samples, seed=self.seed)
        for run in self.runs:
            found, matrices = measurer.measure(run)
            numbers[run.name] |= found
            _logger.info(f'{run.name} measured on {found["num_samples"]} images of {self.data.split}.')
            self._draw_alone(run, numbers[run.name], matrices)
        reference = numbers[self.reference.name]['top1'] if self.reference else None
        for values in numbers.values():
            if 'diversity' in values:
                values['diversity']['gain'] = describe_gain(values['top1'], reference)

    def _draw_alone(self, run: Run, numbers: Mapping[str, Any], matrices: Mapping[str, list[Tensor]]) -> None:
        """Write the pictures of one run, whose matrices are not kept."""
        if not matrices:
            return
        labels = read_json(run.files.best / CONFIG_NAME).get('label_names')
        name = run.name.replace('/', '+')  # a-b/c and a/b-c stay two
        title = f'{run.name}: {run.args["model"]}, {run.method}'
        of_split = f'{title}, {numbers["num_samples"]} images of {self.data.split}'
        self._save(f'fig1_architecture_{name}', lambda: draw_architecture(numbers['architecture'], title))
        self._save(f'fig2_agreement_{name}', lambda: draw_agreement(numbers['agreement'], of_split, labels))
        self._save(f'fig4_dissimilarity_{name}', lambda: draw_dissimilarity(numbers['dissimilarity'], matrices, title))

    def _save(self, name: str, draw: Callable[[], Any]) -> None:
        if not self.draws:
            return
        try:
            picture = encode_png(draw())
        except ImportError:
            self.draws = False
            _logger.warning(f'Only numbers are written: {MATPLOTLIB_MISSING}')
            return
        with replacing(self.out / f'{name}.png') as draft:
            draft.write_bytes(picture)


def figures_of_all(content: Mapping[str, Any]) -> dict[str, Callable[[], Any]]:
    """Return name -> what draws it, of the figures that compare runs, given what is in `analysis.json`."""
    runs, reference, label = content['runs'], content['reference'], _LABELS[content['metric']]
    figures: dict[str, Callable[[], Any]] = {}
    curves = {name: values['curve'] for name, values in runs.items() if values['curve']['epochs']}
    pairs = {name: curve for name, curve in curves.items() if curve['ensemble']}
    if pairs:
        figures['fig3_main_and_ensemble'] = lambda: draw_main_and_ensemble(pairs, label)
    if curves:
        figures['fig5_training'] = lambda: draw_training(curves, label, reference)
    diversities = {name: values['diversity'] for name, values in runs.items() if 'diversity' in values}
    taught = {name: values for name, values in diversities.items() if values['teacher'] and _can_place(values)}
    if taught and reference is not None:  # gains are over it
        figures['table4_diversity'] = lambda: draw_diversity(taught, reference)
    points = {name: values['accuracy_over_macs'] for name, values in runs.items() if 'accuracy_over_macs' in values}
    if points:
        title = f'{content["dataset"]}, {content["split"]} split'
        figures['accuracy_over_macs'] = lambda: draw_accuracy_over_macs(points, title)
    return figures


def _can_place(diversity: Mapping[str, Any]) -> bool:
    """Return whether there is a gain, and a teacher of several members, since one alone has no diversity."""
    return diversity['teacher']['disagreement'] is not None and None not in diversity['gain'].values()


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, _JSON_DIGITS) if value == value else None
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def format_json(content: Mapping[str, Any]) -> str:
    """Return JSON with one line per row of numbers, which `json` would give a line each.

    >>> print(format_json({'a': [[1, 2.5], [None, 4]]}).rstrip())
    {
      "a": [
        [1, 2.5],
        [null, 4]
      ]
    }
    """
    text = json.dumps(content, indent=2, allow_nan=False)
    return _ROW.sub(lambda match: json.dumps(json.loads(match[0])), text) + '\n'


def summary_rows(numbers: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a table of runs for people, given `analysis.json`'s `runs`."""
    rows = []
    for name, values in numbers.items():
        curve, top1 = values['curve'], values.get('top1', {})
        after = values.get('dissimilarity', {}).get('after', {}).get('main', {})
        teacher = values.get('diversity', {}).get('teacher') or {}
        gain = values.get('diversity', {}).get('gain') or {}
        rows.append(
            {
                'run': name,
                'method': values['method'],
                'main': top1.get('main', curve['final_main']),
                'ensemble': top1.get('ens'),
                'gain': gain.get('main'),
                'gap, last half': curve['mean_gap'],
                'epochs to reference': curve.get('epochs_to_keep'),
                'deviation of changes': curve['instability'],
                'RDM ratio of main': after.get('ratio'),
                'disagreement in teacher': teacher.get('disagreement'),
            }
        )
    return rows
