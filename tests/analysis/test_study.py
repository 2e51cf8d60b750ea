"""The analysis as a whole: runs of train.py, the numbers and figures that it writes of them."""

import builtins
import csv
import json
import math
import shutil

import numpy as np
import pytest
import torch
import yaml
from helpers import write_images
from helpers.analysis import random_logits
from helpers.runs import script_state
from PIL import Image
from timm.data import create_transform, resolve_data_config

import timm_multiexit as tme
from timm_multiexit.analysis.agreement import describe_agreement
from timm_multiexit.analysis.curves import epochs_to_keep
from timm_multiexit.analysis.dissimilarity import block_means, choose_samples, dissimilarity_matrix
from timm_multiexit.analysis.diversity import describe_members
from timm_multiexit.analysis.measuring import AnalysisData, measure_top1
from timm_multiexit.analysis.runs import Run, find_reference, read_runs
from timm_multiexit.analysis.study import Study, format_json
from timm_multiexit.cli import train
from timm_multiexit.cli.analyze import main

FLAGS = '--model test_resnet --img-size 32 -b 8 -j 0 --opt adamw --lr 0.002'


RUNS = {
    'ce': '--exits 1,3 --exit-loss ce --epochs 3',
    'eed': '--exits 1,2,3 --eed --epochs 2',
    'part': '--exits 1,3 --eed --exit-teacher 0,-1 --exit-output-loss mse --epochs 1',
    'plain': '--epochs 2',
}


NO_DATA = AnalysisData('cifar10', 'test', lambda in_chans: None, lambda dataset, config: None)


def test_top1_of_one_classifier_has_no_ensemble():
    logits, targets = random_logits(1), torch.randint(0, 5, (40,))
    assert set(measure_top1(logits, targets)) == {'main'}
    assert set(measure_top1(logits * 2, targets)) == {'exit0', 'main', 'ens'}


def test_json_has_a_line_per_row_of_numbers_and_reads_back():
    content = {'a': [[1, -2.5e-06], [None, 3]], 'b': ['x [1,\n 2]', 1], 'c': [], 'd': [{'e': [1]}]}
    text = format_json(content)
    assert json.loads(text) == content
    assert '    [1, -2.5e-06],\n    [null, 3]\n' in text
    with pytest.raises(ValueError, match='not JSON compliant'):
        format_json({'a': math.nan})


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Four runs of one data set, with two exits, three, two of which teach, and none; nobody changes them."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('runs')
    images = write_images(folder / 'images')
    for name, flags in RUNS.items():
        with script_state(folder):
            paths = ('--data-dir', str(images), '--output', str(folder / 'out'), '--experiment', name)
            assert train.main([*FLAGS.split(), *flags.split(), *paths]) == 0
    return folder


def analyse(folder, *argv, names=tuple(RUNS), cwd=None):
    """Run the program and return its code."""
    runs = [str(folder / 'out' / name) for name in names]
    with script_state(cwd or folder):
        return main([*runs, '-j', '0', '-b', '4', *map(str, argv)])


@pytest.fixture(scope='module')
def analysed(folder, tmp_path_factory):
    """What the program wrote for all four."""
    out = tmp_path_factory.mktemp('analysed') / 'a/b'
    assert analyse(folder, '--out', out, '--samples', '8') == 0
    return out


@pytest.fixture(scope='module')
def numbers(analysed):
    return json.loads((analysed / 'analysis.json').read_text())


@pytest.fixture
def undrawn(monkeypatch):
    """Leaves the pictures out, which take most of the time."""

    def refuse(figure):
        raise ImportError('matplotlib')

    monkeypatch.setattr('timm_multiexit.analysis.study.encode_png', refuse)


def fails(capsys, folder, *argv, **kwargs):
    """The one line that the program ends with."""
    capsys.readouterr()
    assert analyse(folder, *argv, **kwargs) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith('timm-multiexit analyze: error: ')
    return error.removeprefix('timm-multiexit analyze: error: ')


def test_every_figure_is_written_and_none_is_blank(analysed):
    exits = ('ce', 'eed', 'part')
    alone = {f'fig{figure}_{name}' for figure in ('1_architecture', '2_agreement', '4_dissimilarity') for name in exits}
    together = {'fig3_main_and_ensemble', 'fig5_training', 'table4_diversity', 'accuracy_over_macs'}
    paths = list(analysed.glob('*.png'))
    assert {path.stem for path in paths} == alone | together
    assert {path.name for path in analysed.iterdir()} == {path.name for path in paths} | {'analysis.json'}
    for path in paths:
        with Image.open(path, formats=['PNG']) as image:
            assert min(image.size) >= 450
            assert len(set(image.convert('L').tobytes())) > 10, path


def test_accuracy_is_that_of_the_runs_own_tables(folder, numbers):
    for name in RUNS:
        results = json.loads((folder / 'out' / name / 'results.json').read_text())
        rows = {row['exit']: row for row in results['rows']}
        found = numbers['runs'][name]
        own = {key.removeprefix('exit'): value for key, value in found['top1'].items()}
        assert own == pytest.approx({key: row['top-1'] for key, row in rows.items()}, abs=1e-3)
        for point in found['accuracy_over_macs']:
            row = rows[point['classifier'].removeprefix('exit')]
            assert point['sequential'] == pytest.approx(1e9 * row['GMACs sequential'])
            assert point['fixed'] == (row['GMACs fixed'] and pytest.approx(1e9 * row['GMACs fixed']))
        assert (found['num_samples'], found['best_epoch']) == (11, results['best_epoch'] + 1)


def test_curves_are_those_of_the_summaries(folder, numbers):
    for name in RUNS:
        with (folder / 'out' / name / 'summary.csv').open() as file:
            rows = list(csv.DictReader(file))
        curve = numbers['runs'][name]['curve']
        assert curve['main'] == pytest.approx([float(row['eval_top1']) for row in rows], abs=1e-5)
        assert curve['epochs'] == [int(row['epoch']) + 1 for row in rows]
    target = numbers['runs']['ce']['curve']['final_main']
    curve = numbers['runs']['eed']['curve']
    assert numbers['reference'] == 'ce'
    assert curve['epochs_to_keep'] == epochs_to_keep(curve['epochs'], curve['main'], target)


def test_runs_without_exits_have_curves_and_costs_alone(numbers):
    described = {
        'model',
        'method',
        'seed',
        'best_epoch',
        'curve_of',
        'curve',
        'num_samples',
        'top1',
        'accuracy_over_macs',
    }
    assert numbers['runs']['plain'].keys() == described
    others = {'architecture', 'agreement', 'diversity', 'dissimilarity'}
    assert numbers['runs']['eed'].keys() == described | others
    assert [run['method'] for run in numbers['runs'].values()] == ['ce', 'eed-kl', 'eed-mse-teacher[0,-1]', 'plain']


def test_numbers_are_those_of_the_network_on_the_images(folder, numbers):
    model = tme.create_model(f'local-dir:{folder}/out/eed/best', pretrained=True).eval()
    paths = sorted((folder / 'images/val').glob('*/*.jpg'))
    transform = create_transform(**resolve_data_config({}, model=model))
    images = torch.stack([transform(Image.open(path).convert('RGB')) for path in paths])
    targets = torch.tensor([['cat', 'dog'].index(path.parent.name) for path in paths])
    with torch.no_grad():
        outputs = model(images, exits=True)
    found = numbers['runs']['eed']
    expected = describe_agreement(outputs.logits, targets)
    assert np.allclose(found['agreement']['outcomes'], expected['outcomes'], atol=1e-5)
    assert found['agreement']['classifiers'] == ['exit0', 'exit1', 'exit2', 'main', 'ens']
    teacher = describe_members(outputs.logits, targets, dict.fromkeys(range(4), 0.25))
    assert found['diversity']['teacher'] == found['diversity']['all']
    assert found['diversity']['teacher']['softmax_variance'] == pytest.approx(teacher['softmax_variance'], abs=1e-4)
    # Eight of the eleven images, four of each class, which do not depend on the run.
    places = choose_samples(targets, 8)
    matrix = dissimilarity_matrix(outputs.features[-1][places])
    means = block_means(matrix, targets[places])
    assert found['dissimilarity']['before']['main']['within'] == pytest.approx(means['within'], abs=1e-3)
    assert found['dissimilarity']['num_samples'] == 8


def test_reference_gives_its_last_epoch_and_its_accuracy(tmp_path, monkeypatch, undrawn):
    values = {'ce': ([60.0, 50.0], {'main': 70.0, 'ens': 72.0}), 'eed': ([55.0, 58.0], {'main': 71.5, 'ens': 71.0})}
    runs = []
    for name, (curve, _) in values.items():
        rows = [{'epoch': idx, 'eval_top1': value} for idx, value in enumerate(curve)]
        args = {'exits': 'auto', 'exit_loss': name, 'model': 'a', 'task': 'classification', 'val_split': 'v'}
        runs.append(Run(name, tmp_path, args, rows, {}))

    def measure(self, run):
        return {'num_samples': 9, 'top1': values[run.name][1], 'diversity': {'teacher': None}}, {}

    monkeypatch.setattr('timm_multiexit.analysis.study.Measurer.measure', measure)
    found = Study(runs, NO_DATA, tmp_path, device=torch.device('cpu')).run()['runs']['eed']
    assert found['diversity']['gain'] == {'main': 1.5, 'ens': -1.0}
    assert found['curve']['epochs_to_keep'] == 1  # 55 and 58 are above 50, and both below 60


def test_gains_are_over_the_reference(numbers):
    runs = numbers['runs']
    gain = runs['part']['diversity']['gain']
    assert gain['main'] == pytest.approx(runs['part']['top1']['main'] - runs['ce']['top1']['main'], abs=1e-5)
    assert gain['ens'] == pytest.approx(runs['part']['top1']['ens'] - runs['ce']['top1']['ens'], abs=1e-5)
    assert runs['ce']['diversity']['gain'] == {'main': 0, 'ens': 0}
    assert runs['ce']['diversity']['teacher'] is None
    assert runs['part']['diversity']['teacher']['members'] == ['exit0', 'main']


def test_no_path_of_this_machine_is_written(folder, analysed):
    text = (analysed / 'analysis.json').read_text()
    assert [word for word in (str(folder), str(analysed.parents[1]), '/tmp/', '/work') if word in text] == []


def test_without_matplotlib_numbers_are_written(folder, tmp_path, monkeypatch, caplog, numbers):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith('matplotlib'):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, '__import__', refuse)
    assert analyse(folder, '--out', tmp_path, '--samples', '8', names=('eed', 'ce')) == 0
    assert [path.name for path in tmp_path.iterdir()] == ['analysis.json']
    assert [record.message for record in caplog.records if 'matplotlib' in record.message] == [
        'Only numbers are written: matplotlib is not installed. Install it with pip install "timm-multiexit[plots]".'
    ]
    assert json.loads((tmp_path / 'analysis.json').read_text())['runs']['eed'] == numbers['runs']['eed']


def test_numbers_of_a_run_do_not_depend_on_the_others(folder, tmp_path, numbers, undrawn):
    assert analyse(folder, '--out', tmp_path, '--samples', '8', '--reference', 'eed-kl', names=('eed',)) == 0
    alone = json.loads((tmp_path / 'analysis.json').read_text())
    assert alone['reference'] == 'eed'
    assert alone['runs']['eed']['dissimilarity'] == numbers['runs']['eed']['dissimilarity']


def test_reference_is_named_by_run_or_method(folder):
    runs = read_runs([folder / 'out' / name for name in RUNS])
    assert find_reference(runs, None).name == 'ce'
    assert find_reference(runs, 'part').name == 'part'
    assert find_reference(runs, 'eed-kl').name == 'eed'
    assert find_reference(runs[1:], None) is None
    with pytest.raises(tme.MultiExitError, match=r"--reference must be .*, ce \(ce\), eed.*, got 'byot'"):
        find_reference(runs, 'byot')


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['--split', 'test'], "must be one of train, val, got 'test'."),
        (['--data-dir', 'nothing'], "Data folder 'nothing' does not exist"),
        (['--reference', 'byot'], "got 'byot'"),
    ],
    ids=['split', 'folder', 'reference'],
)
def test_what_cannot_be_done_is_said_in_one_line(argv, message, folder, tmp_path, capsys):
    assert message in fails(capsys, folder, '--out', tmp_path, *argv, names=('ce',))


def test_data_of_other_classes_is_refused(folder, tmp_path, capsys):
    images = shutil.copytree(folder / 'images', tmp_path / 'images')
    shutil.copytree(images / 'val/dog', images / 'val/eel')
    message = fails(capsys, folder, '--data-dir', images, '--out', tmp_path, names=('plain',))
    assert message.startswith('plain on the validation split: Class indices must be in [0, 1] for 2 classes, got 2.')


def test_folder_that_is_no_run_is_refused(folder, tmp_path, capsys):
    assert 'it has no args.yaml' in fails(capsys, folder, names=('..',))
    assert 'is given twice' in fails(capsys, folder, names=('ce', 'ce'))
    run = shutil.copytree(folder / 'out/ce', tmp_path / 'out/run', ignore=shutil.ignore_patterns('*.pth.tar'))
    (run / 'args.yaml').write_text('- 1\n')
    assert 'args.yaml must be a mapping' in fails(capsys, tmp_path, names=('run',), cwd=folder)
    shutil.rmtree(run / 'best')
    assert 'it has no best/config.json' in fails(capsys, tmp_path, names=('run',), cwd=folder)


def test_other_accuracy_than_the_runs_own_is_warned_of(folder, tmp_path, caplog, undrawn):
    run = shutil.copytree(folder / 'out/plain', tmp_path / 'out/run', ignore=shutil.ignore_patterns('*.pth.tar'))
    results = json.loads((run / 'results.json').read_text())
    results['rows'][-1]['top-1'] -= 5
    (run / 'results.json').write_text(json.dumps(results))
    assert analyse(tmp_path, '--out', tmp_path / 'a', names=('run',), cwd=folder) == 0
    assert [record.message for record in caplog.records if 'run reported' in record.message]


def test_runs_of_several_labels_have_curves_alone(folder, tmp_path):
    run = shutil.copytree(folder / 'out/ce', tmp_path / 'out/run', ignore=shutil.ignore_patterns('*.pth.tar'))
    args = yaml.safe_load((run / 'args.yaml').read_text())
    (run / 'args.yaml').write_text(yaml.safe_dump(args | {'task': 'multilabel'}))
    text = (run / 'summary.csv').read_text().replace('top1', 'map')
    (run / 'summary.csv').write_text(text)
    assert analyse(tmp_path, '--out', tmp_path / 'a', names=('run',), cwd=folder) == 0
    found = json.loads((tmp_path / 'a/analysis.json').read_text())
    assert found['metric'] == 'map'
    assert len(found['runs']['run']['curve']['main']) == 3
    assert {path.stem for path in (tmp_path / 'a').glob('*.png')} == {'fig3_main_and_ensemble', 'fig5_training'}
    mixed = read_runs([run, folder / 'out/ce'])
    with pytest.raises(tme.MultiExitError, match='Cannot compare runs'):
        Study(mixed, NO_DATA, tmp_path, device=torch.device('cpu'))
