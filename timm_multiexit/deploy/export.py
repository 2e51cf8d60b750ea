"""`export`: a model as programs that stop early without Python."""

import os
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from timm_multiexit.deploy import manifest, runner
from timm_multiexit.deploy.programs import (
    check_exported_size,
    check_extra,
    convert_program,
    copy_for_export,
    trace_program,
)
from timm_multiexit.models.dynamic import check_same_classes
from timm_multiexit.models.multi_exit import MultiExitModel, check_model
from timm_multiexit.policies.policy import ExitPolicy
from timm_multiexit.utils.checks import check_choice, check_image_size, check_instance, check_path, is_list
from timm_multiexit.utils.errors import InvalidTypeError, InvalidValueError, StateError, brief
from timm_multiexit.utils.files import new_folder

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch.export import ExportedProgram

FORMS = ('fixed', 'stages', 'conditional')
FORMATS = ('onnx', 'pt2')


def export(
    model: MultiExitModel,
    folder: str | os.PathLike[str],
    *,
    forms: Sequence[str] = FORMS,
    formats: Sequence[str] = ('onnx',),
    input_size: tuple[int, int, int] | None = None,
    class_names: Sequence[str] | None = None,
    policy: ExitPolicy | None = None,
) -> None:
    """Write a model as programs that stop early without Python.

    The folder gets `manifest.json`, `runner.py`, which runs the programs with numpy and ONNX Runtime alone, and

    - `fixed/exit_0.onnx`, ..., `fixed/main.onnx`: each classifier alone, `image` [batch, C, H, W] -> `logits`, with
      the parameters that it needs;
    - `stages/exit_0.onnx`, ..., `stages/main.onnx`: a chain; each gives its classifier's logits and the state that the
      next one takes by the same names, so that a host stops anywhere and continues later, also with some of the rows;
    - `conditional.onnx`: one image, which leaves at run time where the policy says so. `thresholds`, one per exit, NaN
      for one that is not used and not run, and `temperatures`, one per classifier, are inputs; the criterion and what
      is combined are part of the program.

    What they compute is the model in eval mode and float32, to within rounding. The model stays as it is.

    Args:
        model: The model.
        folder: Where to write; a folder that `export` wrote is replaced, others must be empty.
        forms: Of those above, the ones to write.
        formats: 'onnx', and 'pt2', fixed programs and stages for `torch.export.load`.
        input_size: (channels, height, width) of an image; `model.input_size` if not given.
        class_names: One per class, for the manifest; those that the model was loaded with if not given.
        policy: Whose criterion and combination the conditional program has, and whose thresholds are noted; the
            model's own if not given, and without one the criterion is 'confidence'.

    Raises:
        InvalidTypeError: An argument is of the wrong type.
        InvalidValueError: A value is not allowed, the model does not take images of this size, it cannot be exported,
            or the folder holds other files.
        StateError: The extra `onnx` is not installed, or the model has no exits or no data.
        DiskError: The disk is full or not writable; the folder is as it was.
    """
    check_path('folder', folder)
    check_model(model)
    forms, formats = check_programs(forms, formats)
    if len(model.exits) == 0 or model.num_classes < 2:
        raise StateError(
            f'The model must have exits and 2 or more classes to be exported, got {len(model.exits)} and'
            f' {model.num_classes}.'
        )
    size = model.input_size if input_size is None else check_image_size('input_size', input_size, model.in_chans)
    policy = model.policy if policy is None else check_instance('policy', policy, ExitPolicy)
    if policy is not None:
        policy.check_exits(len(model.exits))
    names = manifest.find_class_names(model, class_names)
    if 'onnx' in formats:
        check_extra()
    check_same_classes(model)
    copy = copy_for_export(model)
    check_exported_size(copy, size)
    values = manifest.describe_exported(model, size, class_names=names, policy=policy)
    with new_folder(folder, manifest.EXPORT_MARKS, manifest.EXPORT_FILES) as draft:
        program = trace_program(copy, size)
        programs: dict[str, Any] = {'fixed': [], 'stages': [], 'conditional': None}
        if 'pt2' in formats:  # first: for ONNX the program is changed
            values['pt2'] = write_torch_programs(program, draft, forms)
        if 'onnx' in formats:
            whole = convert_program(program, type(model.backbone).__name__)
            programs = write_programs(whole, draft, forms, policy)
        values['programs'] = {'fp32': programs}
        shutil.copyfile(runner.__file__, draft / manifest.RUNNER_NAME)
        manifest.write_manifest(draft, values)


def check_programs(forms: Sequence[str], formats: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the forms and the formats of programs, each once, in their own order; see `export`.

    Raises:
        InvalidTypeError: One is not a list.
        InvalidValueError: An unknown or no name, or a format without a program.
    """
    forms, formats = _check_names('forms', forms, FORMS), _check_names('formats', formats, FORMATS)
    if 'pt2' in formats and forms == ('conditional',):
        raise InvalidValueError(
            'forms must have fixed or stages for the format pt2, got conditional alone: torch.export traces one path,'
            ' and a conditional program chooses between several.'
        )
    return forms, formats


def _check_names(name: str, values: Any, allowed: Collection[str]) -> tuple[str, ...]:
    """Return some of the allowed names, each once, in their own order."""
    if not is_list(values):
        raise InvalidTypeError(f'{name} must be a list of {", ".join(allowed)}, got {brief(values)}.')
    given = [check_choice(name, value, allowed) for value in values]
    if not given:
        raise InvalidValueError(f'{name} must be one or more of {", ".join(allowed)}, got none.')
    return tuple(value for value in allowed if value in given)


def write_programs(
    whole: 'ModelProto', folder: Path, forms: Collection[str], policy: ExitPolicy | None, *, below: str = ''
) -> dict[str, Any]:
    """Cut a graph of all classifiers, write its programs and return their part of the manifest.

    Args:
        whole: The graph.
        folder: The exported folder.
        forms: Which programs.
        policy: See `export`.
        below: Folder in the exported folder for the programs, such as 'int8/'.
    """
    import onnx

    from timm_multiexit.deploy.conditional import make_conditional
    from timm_multiexit.deploy.graph import ExitGraph

    graph = ExitGraph(whole)
    names = program_names(len(graph.exits) - 1)

    def write(program: 'ModelProto', path: str) -> str:
        target = folder / f'{below}{path}'
        target.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(program, target)
        return f'{below}{path}'

    programs: dict[str, Any] = {'fixed': [], 'stages': [], 'conditional': None}
    if 'fixed' in forms:
        programs['fixed'] = [write(graph.fixed(idx), f'fixed/{name}.onnx') for idx, name in enumerate(names)]
    if 'stages' in forms:
        programs['stages'] = [write(stage, f'stages/{name}.onnx') for stage, name in zip(graph.stages(), names)]
    if 'conditional' in forms:
        rule = policy or ExitPolicy()
        program = make_conditional(graph, criterion=rule.criterion, combine=rule.combine, policy=policy)
        path = write(program, 'conditional.onnx')
        programs['conditional'] = {'path': path, 'criterion': rule.criterion, 'combine': rule.combine}
    return programs


def write_torch_programs(program: 'ExportedProgram', folder: Path, forms: Collection[str]) -> dict[str, list[str]]:
    """Cut the program of all classifiers, write its parts as `.pt2` and return their part of the manifest."""
    from timm_multiexit.deploy.torch_graph import TorchGraph

    graph = TorchGraph(program)
    names = program_names(len(graph.exits) - 1)
    found: dict[str, list[str]] = {'fixed': [], 'stages': []}
    if 'fixed' in forms:
        found['fixed'] = [f'fixed/{name}.pt2' for name in names]
    if 'stages' in forms:
        found['stages'] = [f'stages/{name}.pt2' for name in names]
    parts = [graph.fixed(idx) for idx in range(len(found['fixed']))] + (graph.stages() if found['stages'] else [])
    for part, path in zip(parts, (*found['fixed'], *found['stages'])):
        (folder / path).parent.mkdir(exist_ok=True)
        torch.export.save(part, folder / path)
    return found


def program_names(num_exits: int) -> list[str]:
    """Return what the programs of the classifiers are called, without ending.

    >>> program_names(2)
    ['exit_0', 'exit_1', 'main']
    """
    return [*(f'exit_{idx}' for idx in range(num_exits)), 'main']
