"""The layering rule: a module imports only from a lower level, and two things live in one file each."""

import ast
from pathlib import Path

import pytest

import timm_multiexit

PACKAGE = Path(timm_multiexit.__file__).parent
LEVELS = {
    'config': 0,
    'refusals': 0,
    'backbones': 1,  # a folder, one level together
    'cost': 1,
    'hub_errors': 1,
    'hub_files': 1,
    'licenses': 1,
    'markdown': 1,
    'untrusted': 1,
    'flags': 1,
    'risk': 1,
    'seeding': 1,
    'stopping': 1,
    'threshold_search': 1,
    'timing': 1,
    'collecting': 1,
    'config_file': 1,
    'distillation': 1,
    'files': 1,
    'heads': 1,
    'holdout': 1,
    'launch': 1,
    'policy': 1,
    'ranges': 1,
    'stepping': 1,
    'surface': 1,
    'card_results': 2,
    'hub': 2,
    'data': 2,
    'losses': 2,
    'metrics': 2,
    'candidates': 2,
    'pictures': 2,
    'taps': 2,
    'budgets': 3,
    'card': 3,
    'progress': 3,
    'records': 3,
    'checks': 3,
    'routing': 3,
    'survey': 3,
    'calibration': 4,
    'model_config': 4,
    'dynamics': 4,
    'arguments': 4,
    'evidence': 5,  # a folder
    'deadline': 4,
    'latency': 4,
    'loaders': 4,
    'inference': 5,
    'model_folder': 5,
    'model': 6,
    'attach': 7,
    'regimes': 7,
    'truncation': 7,
    'validation_checks': 7,
    'checkpoint': 8,
    'dynamic_report': 8,
    'engine': 8,
    'task': 8,
    'loading': 9,
    'sources': 10,
    'training_checkpoint': 9,
    'factory': 11,
    'journal': 11,
    'objective': 11,
    'saver': 11,
    'validation_data': 11,
    'comparison': 11,
    'build': 12,
    'checkpointing': 12,
    'publication': 13,
    'publication_checks': 12,
    'report': 12,
    'publishing': 14,
    'validation': 13,
    'training': 15,
    'analysis': 16,  # folders too
    'benchmarks': 16,
    '__init__': 17,
}
FILES = sorted(PACKAGE.rglob('*.py'))
HOOK_METHODS = ('register_forward_hook', 'register_forward_pre_hook')


def module_name(path):
    """Return the module of a file, the folder for those in one."""
    return path.relative_to(PACKAGE).parts[0].removesuffix('.py')


def imported_names(source):
    """Return the dotted names that a file of the package imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = '.'.join(filter(None, ['timm_multiexit' if node.level else '', node.module]))
            # What is imported from the package itself is a module of it, or a public name, which __init__ has.
            names |= {f'{parent}.{alias.name}' for alias in node.names} if parent == 'timm_multiexit' else {parent}
    return names


def imported_modules(source):
    """Return the modules of the package that a file of it imports."""
    found = set()
    for name in imported_names(source):
        if name.split('.')[0] == 'timm_multiexit':
            inner = name.split('.')[1:]
            found.add(inner[0] if inner and (inner[0] in LEVELS or (PACKAGE / inner[0]).exists()) else '__init__')
    return found


def test_every_module_has_a_level():
    assert (len(FILES), len(LEVELS)) == (107, 80)
    assert {module_name(path) for path in FILES} == set(LEVELS)


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_module_imports_only_from_a_lower_level(path):
    name = module_name(path)
    others = imported_modules(path.read_text()) - ({name} if path.parent != PACKAGE else set())
    wrong = {other for other in others if LEVELS[other] >= LEVELS[name]}
    assert not wrong, f'{name} (level {LEVELS[name]}) imports {sorted(wrong)}'


def test_imports_are_found_in_all_their_forms():
    source = (
        'import os, timm_multiexit.heads\n'
        'from timm_multiexit.config import ExitSpec\n'
        'from timm_multiexit import taps, attach_exits\n'
        'def later():\n'
        '    from .metrics import exit_names\n'
        '    from . import model\n'
        '    import timm.models\n'
    )
    assert imported_modules(source) == {'heads', 'config', 'taps', '__init__', 'metrics', 'model'}


def test_only_taps_registers_forward_hooks():
    users = [module_name(path) for path in FILES if any(method in path.read_text() for method in HOOK_METHODS)]
    assert users == ['taps']


def test_the_network_is_for_hub_alone():
    """The card takes classes of data from its client."""
    users = {
        module_name(path)
        for path in FILES
        if any(name.split('.')[0] == 'huggingface_hub' for name in imported_names(path.read_text()))
    }
    assert users == {'hub', 'hub_errors', 'card'}
