"""The rules of the package's tree, its imports, its errors and its words, beside those of import-linter."""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import timm_multiexit

PACKAGE = Path(timm_multiexit.__file__).parent
ROOT = PACKAGE.parent
MODULES = sorted(PACKAGE.rglob('*.py'))
TREES = {path: ast.parse(path.read_text(encoding='utf-8')) for path in MODULES}
HOOKS = re.compile(r'register_\w*hook')
# Whole words: 'amend', 'ongoing', 'agency is now' are none of them.
FORBIDDEN = [
    r'\bis no\b',
    r'\bare none\b',
    r'\bgone on with\b',
    r'\bgo(es)? on\b',
    r'\bmend(s|ed|ing)?\b',
    r'\breckon(s|ed|ing)?\b',
    r'\bcannot be had\b',
    r'\bto be had\b',
    r'\bof use\b',
    r'\basked for\b',
    r', allowed (is|are)\b',
    r'\bcannot be made so\b',
    r'\bof no effect\b',
]


def where(path):
    return path.relative_to(ROOT).as_posix()


def test_trees_are_those_of_the_whole_package():
    assert len(TREES) >= 90
    assert {path.parent.name for path in MODULES} >= {'utils', 'exits', 'models', 'checkpoints', 'training', 'flags'}


def test_public_name_is_defined_once():
    places = defaultdict(set)
    for path, tree in TREES.items():
        if path.name == '__init__.py':
            continue  # hands on what others define
        for node in tree.body:
            names = [getattr(node, 'name', None)]
            if isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
            for name in names:
                if name and not name.startswith('_'):
                    places[name].add(where(path))
    # timm reads `default_cfgs` of each module that registers models, and each script has its `main`.
    twice = {name: sorted(paths) for name, paths in places.items() if len(paths) > 1}
    assert len(places) >= 300
    assert {name: paths for name, paths in twice.items() if name not in ('default_cfgs', 'main')} == {}


def test_folder_has_at_most_ten_files():
    folders = {path.parent for path in MODULES}
    assert len(folders) >= 14
    counts = {
        where(folder): len([path for path in folder.glob('*.py') if path.stem != '__init__']) for folder in folders
    }
    assert {folder: count for folder, count in counts.items() if count > 10} == {}


def test_only_taps_register_hooks():
    found = {
        where(path)
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and HOOKS.fullmatch(node.attr)
    }
    assert found == {'timm_multiexit/exits/taps.py'}


def test_errors_have_a_kind():
    num_raised, bare = 0, []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                num_raised += 1
                if ast.unparse(node.exc.func).split('.')[-1] == 'MultiExitError':
                    bare.append(f'{where(path)}:{node.lineno}')
    assert num_raised >= 200
    assert bare == []


def test_no_package_hands_on_a_name_of_its_submodule():
    inits = [path for path in MODULES if path.name == '__init__.py']
    assert len(inits) >= 14
    wrong = []
    for path in inits:
        submodules = {other.stem for other in path.parent.glob('*.py')} | {
            other.name for other in path.parent.iterdir() if (other / '__init__.py').exists()
        }
        package = '.'.join(path.parent.relative_to(ROOT).parts)
        for node in TREES[path].body:
            if isinstance(node, ast.ImportFrom) and node.module != package:  # the modules themselves may be imported
                wrong += [
                    f'{package}.{alias.asname or alias.name}'
                    for alias in node.names
                    if (alias.asname or alias.name) in submodules
                ]
    assert wrong == []


@pytest.mark.parametrize('phrase', FORBIDDEN)
def test_phrase_occurs_nowhere(phrase):
    scripts = [path for path in ROOT.glob('*.py')]
    hub = [path for path in (ROOT / 'hub').rglob('*.py')]
    paths = [*MODULES, *PACKAGE.rglob('*.jinja'), *scripts, *hub, ROOT / 'README.md']
    assert len(paths) >= 95
    # Across line ends and the quotes of a string that goes over several lines.
    texts = {
        path: re.sub(r"""['"]?\s*\n\s*(#\s*|f?['"]\s*)?""", ' ', path.read_text(encoding='utf-8')) for path in paths
    }
    found = {
        where(path): [text[max(match.start() - 30, 0) : match.end() + 20] for match in re.finditer(phrase, text, re.I)]
        for path, text in texts.items()
    }
    assert {path: hits for path, hits in found.items() if hits} == {}


# A script of its own, that is copied beside exported programs; within the package its flags are not read.
SCRIPT = 'timm_multiexit/deploy/runner.py'
RUNNER = TREES[ROOT / SCRIPT]


def imported(tree):
    """Return the modules that a module imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_flags_are_known_in_cli_alone():
    users = {where(path) for path, tree in TREES.items() if 'argparse' in imported(tree)}
    assert len(users) >= 3
    assert {path for path in users if not path.startswith('timm_multiexit/cli/')} == {SCRIPT}


def test_contracts_of_import_linter_are_kept():
    done = subprocess.run(
        [sys.executable, '-c', 'from importlinter.cli import lint_imports_command as run; run()'],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert int(re.search(r'(\d+) files?', done.stdout)[1]) >= 90
    assert re.search(r'Contracts: ([5-9]|\d\d) kept, 0 broken', done.stdout)


@pytest.fixture(scope='module')
def loaded():
    """The modules that `import timm_multiexit` loads."""
    code = 'import sys, timm_multiexit; print(*sorted(sys.modules))'
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize(
    'module', ['timm_multiexit.cli', 'timm_multiexit.training.run', 'timm_multiexit.training.trackers', 'matplotlib']
)
def test_import_of_the_package_leaves_module_out(module, loaded):
    assert 'timm_multiexit.models.multi_exit' in loaded
    assert [name for name in loaded if name == module or name.startswith(f'{module}.')] == []


def test_import_of_the_package_loads_no_module_that_knows_flags(loaded):
    own = [name for name in loaded if name.startswith('timm_multiexit.')]
    assert len(own) >= 40
    users = {
        '.'.join(path.with_suffix('').relative_to(ROOT).parts)
        for path, tree in TREES.items()
        if 'argparse' in imported(tree)
    }
    assert sorted(users.intersection(own)) == [SCRIPT.removesuffix('.py').replace('/', '.')]
    assert 'argparse' not in {node.module for node in RUNNER.body if isinstance(node, ast.ImportFrom)}
    assert 'argparse' not in {
        alias.name for node in RUNNER.body if isinstance(node, ast.Import) for alias in node.names
    }


def test_public_names():
    assert timm_multiexit.__all__ == sorted(
        timm_multiexit.__all__, key=lambda name: (not name.isupper(), not name[0].isupper(), name)
    )
    assert all(hasattr(timm_multiexit, name) for name in timm_multiexit.__all__)
    assert {'MultiExitError', 'CheckpointError', 'HubError', 'StateError', '__version__'} <= set(timm_multiexit.__all__)
    assert len(timm_multiexit.__all__) == 33
    assert (PACKAGE / 'py.typed').read_text() == ''
