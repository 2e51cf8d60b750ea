"""`manifest.json`: what is in an exported folder, and how its programs are used."""

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from timm.data.config import resolve_data_config

from timm_multiexit.calibration.stage_costs import StageCosts, adapt_budgets
from timm_multiexit.deploy import runner
from timm_multiexit.deploy.programs import OPSET
from timm_multiexit.evaluation.stamp import describe_preparation
from timm_multiexit.models.multi_exit import MultiExitModel
from timm_multiexit.policies.budgets import BudgetTable
from timm_multiexit.policies.policy import ExitPolicy
from timm_multiexit.utils.checks import is_list
from timm_multiexit.utils.errors import CheckpointError, InvalidTypeError, InvalidValueError, brief
from timm_multiexit.utils.files import sha256, write_text
from timm_multiexit.utils.untrusted import check_contained
from timm_multiexit.version import __version__

MANIFEST_NAME = runner.MANIFEST
RUNNER_NAME = runner.OWN_NAME

# All files that an exported folder may hold, and `.int8-` what an interrupted quantization left.
EXPORT_FILES = (
    MANIFEST_NAME,
    RUNNER_NAME,
    'conditional.onnx',
    *(f'{form}/*.{suffix}' for form in ('fixed', 'stages') for suffix in ('onnx', 'pt2')),
    *('int8/*.onnx', '.int8-*'),
)
EXPORT_MARKS = (MANIFEST_NAME, RUNNER_NAME)  # each has these two

_LIBRARIES = ('timm', 'torch', 'onnx', 'onnxruntime')
_PREPROCESSING = ('input_size', 'interpolation', 'crop_pct', 'crop_mode', 'mean', 'std')


def describe_exported(
    model: MultiExitModel,
    input_size: tuple[int, int, int],
    *,
    class_names: list[str] | None,
    policy: ExitPolicy | None,
) -> dict[str, Any]:
    """Return what the manifest says of a model, without programs and files.

    Args:
        model: The model.
        input_size: (channels, height, width) of an image.
        class_names: What `find_class_names` gave.
        policy: Where images leave when nobody says.
    """
    preparation = describe_preparation({**resolve_data_config(model=model), 'input_size': input_size})
    costs = model.cost(input_size)
    names = [*(f'exit {idx}' for idx in range(len(costs) - 1)), 'main']
    return {
        'format': runner.FORMAT,
        'name': str(model.pretrained_cfg.get('architecture') or type(model.backbone).__name__),
        'versions': {'timm_multiexit': __version__, **{name: _find_version(name) for name in _LIBRARIES}},
        'opset': OPSET,
        'num_classes': model.num_classes,
        'classes': class_names,
        'preprocessing': {name: preparation[name] for name in _PREPROCESSING},
        'exits': [
            {
                'name': name,
                'macs': {'fixed': cost.fixed.macs, 'sequential': cost.sequential.macs},
                'params': cost.fixed.params,
            }
            for name, cost in zip(names, costs)
        ],
        'plain_macs': costs[-1].fixed.macs,
        'policy': None if policy is None else policy.to_dict(),
        'budgets': describe_budgets(model.budgets, StageCosts.from_exit_costs(costs)),
        'programs': {},
        'pt2': None,
        'int8': None,
        'files': {},
    }


def find_class_names(model: MultiExitModel, class_names: Sequence[str] | None = None) -> list[str] | None:
    """Return the names of the classes, in order: as given, else those that the model was loaded with, if any.

    Raises:
        InvalidTypeError: The names are not a list of texts.
        InvalidValueError: They are not one per class.
    """
    if class_names is None:
        names = model.pretrained_cfg.get('label_names') or ()
        fits = is_list(names) and len(names) == model.num_classes and all(isinstance(name, str) for name in names)
        return list(names) if fits else None
    if not is_list(class_names) or not all(isinstance(name, str) for name in class_names):
        raise InvalidTypeError(f'class_names must be a list of texts, got {brief(class_names)}.')
    if len(class_names) != model.num_classes:
        raise InvalidValueError(f'class_names must be {model.num_classes}, one per class, got {len(class_names)}.')
    return list(class_names)


def describe_budgets(budgets: BudgetTable | None, costs: StageCosts) -> list[dict[str, Any]]:
    """Return a table of budgets in MACs as the manifest has it, at these costs; empty for none."""
    points = () if budgets is None or budgets.total_macs is None else adapt_budgets(budgets, costs).points
    return [{'macs': point.macs, 'accuracy': point.accuracy, 'policy': point.policy.to_dict()} for point in points]


def read_costs(manifest: Mapping[str, Any]) -> StageCosts:
    """Return what leaving costs in MACs, as a manifest says."""
    macs = [each['macs'] for each in manifest['exits']]
    spent = [each['sequential'] - each['fixed'] for each in macs]  # on shallower heads
    heads = [after - before for before, after in zip(spent, spent[1:])]
    paths = [each['fixed'] - head for each, head in zip(macs, (*heads, 0))]
    return StageCosts(tuple(paths), tuple(heads))


def _find_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def describe_files(folder: Path, pattern: str = '**/*') -> dict[str, Any]:
    """Return sizes and checksums of the files in a folder that a pattern finds, but for its manifest."""
    paths = sorted(path for path in folder.glob(pattern) if path.is_file() and path != folder / MANIFEST_NAME)
    return {
        path.relative_to(folder).as_posix(): {'size': path.stat().st_size, 'sha256': sha256(path)} for path in paths
    }


def write_manifest(folder: Path, values: Mapping[str, Any], files: Mapping[str, Any] | None = None) -> None:
    """Write the manifest of a folder whose other files are all there; `describe_files` is called now unless given."""
    files = dict(sorted((describe_files(folder) if files is None else files).items()))
    write_text(folder / MANIFEST_NAME, json.dumps({**values, 'files': files}, indent=2, allow_nan=False) + '\n')


def read_manifest(folder: str | Path, *, checks_hashes: bool = True) -> dict[str, Any]:
    """Return the manifest of an exported folder that may come from anywhere.

    Args:
        folder: What `export` wrote, or a copy.
        checks_hashes: Compare the checksums too, which reads all files.

    Raises:
        CheckpointError: The folder has no manifest, which says something unknown or not allowed, or a file is missing,
            has changed, or is a link that leaves the folder.
    """
    folder = Path(folder)
    try:
        manifest = runner.load_manifest(folder)
        for name in (MANIFEST_NAME, *manifest['files']):
            check_contained(folder / name)
        runner.check_files(folder, manifest, hashes=checks_hashes)
    except runner.RunnerError as error:
        raise CheckpointError(str(error)) from error
    _check_runner(folder, manifest)
    return manifest


def _check_runner(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raise unless the folder's `runner.py`, which does not check itself, is the one that was written."""
    entry, path = manifest['files'].get(RUNNER_NAME), folder / RUNNER_NAME
    if not path.is_file() and entry is None:
        return
    if entry is None or not path.is_file() or sha256(path) != entry['sha256']:
        raise CheckpointError(f'{path} must be the file that {MANIFEST_NAME} lists: copy the whole folder again.')
