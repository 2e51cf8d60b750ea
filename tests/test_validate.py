import csv
import json

import pytest
import torch

import timm_multiexit as tme
import train
import validate


@pytest.fixture
def run_folder(run_script, image_folder):
    flags = ('--model', 'test_resnet', '--img-size', '32', '-b', '8', '-j', '0', '--epochs', '1', '--exits', '1,3')
    code, _, err = run_script(
        train.main, *flags, '--eed', '--data-dir', image_folder, '--output', 'out', '--experiment', 'r'
    )
    assert code == 0, err
    return image_folder.parent / 'out/r'


def run_validate(run_script, *argv):
    code, out, err = run_script(validate.main, '-j', '0', *argv)
    assert code == 0, err
    table, _, result = out.partition('--result\n')
    return table, json.loads(result)  # nothing may follow the JSON


def test_folder_and_checkpoint_give_the_training_runs_table(run_script, run_folder, image_folder):
    expected = json.loads((run_folder / 'results.json').read_text())['rows']
    for source in (('--model', f'local-dir:{run_folder}/best'), ('--checkpoint', run_folder / 'last.pth.tar')):
        table, result = run_validate(run_script, *source, '--data-dir', image_folder)
        assert result['rows'] == expected
        assert [row['tap'] for row in expected] == ['layer1.0', 'layer3.0', 'classifier', '-']
        assert '11 images' in table


def test_model_name_with_fresh_exits(run_script, image_folder):
    flags = (
        '--model',
        'test_resnet',
        '--exits',
        '2',
        '--exit-head',
        'linear',
        '--num-classes',
        '2',
        '--img-size',
        '64',
    )
    _, result = run_validate(run_script, *flags, image_folder)
    assert [row['exit'] for row in result['rows']] == ['0', '1', 'main', 'ens']


def test_plain_model_has_one_row(run_script, image_folder):
    _, result = run_validate(
        run_script, '--model', 'test_resnet', '--num-classes', '2', '--img-size', '64', image_folder
    )
    assert [row['exit'] for row in result['rows']] == ['main']


def test_results_files(run_script, run_folder, image_folder, tmp_path):
    source = ('--model', f'local-dir:{run_folder}/best', '--data-dir', image_folder)
    _, result = run_validate(run_script, *source, '--results-file', tmp_path / 'new/rows.csv')
    with open(tmp_path / 'new/rows.csv') as file:
        rows = list(csv.DictReader(file))
    assert [float(row['top-1']) for row in rows] == [row['top-1'] for row in result['rows']]
    run_validate(run_script, *source, '--results-file', tmp_path / 'rows.json', '--results-format', 'json')
    saved = json.loads((tmp_path / 'rows.json').read_text())
    assert saved['rows'] == result['rows']
    assert 'torch' in saved['versions']


def test_without_data_the_digits_are_measured(run_script, tmp_path):
    model = tme.create_model('test_resnet', num_classes=10, input_size=(3, 32, 32))
    tme.save_pretrained(model, tmp_path / 'net', data_config={'input_size': (3, 32, 32)})
    table, _ = run_validate(run_script, '--model', f'local-dir:{tmp_path}/net', '--amp', '--amp-dtype', 'bfloat16')
    assert 'test split, 360 images' in table


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ((), 'No model: give --model'),
        (('--model', 'resnet51'), "no model 'resnet51'"),
        (('--model', 'local-dir:nowhere'), 'is no model folder'),
        (('--checkpoint', 'nowhere.pth.tar'), 'There is no checkpoint'),
        (('--model', 'test_resnet', '--exits', '9'), 'room for 1 to 4'),
        (('--model', 'test_resnet', '--num-classes', '1'), 'The data has 2 classes, the model 1'),
        (('--model', 'test_resnet', '--split', 'test'), "has no split 'test', allowed are train, val"),
        (('--model', 'test_resnet', '--amp'), '--amp in float16 needs a GPU'),
    ],
    ids=['none', 'name', 'folder', 'checkpoint', 'exits', 'classes', 'split', 'fp16'],
)
def test_bad_input_is_one_clear_line(flags, message, run_script, image_folder):
    if '--amp' in flags and torch.cuda.is_available():
        pytest.skip('float16 runs on this GPU')
    code, _, err = run_script(validate.main, *flags, '-j', '0', '--data-dir', image_folder)
    assert code == 2
    assert message in err.strip().splitlines()[-1]
    assert 'Traceback' not in err


def test_checkpoint_of_split_norms_is_evaluated_by_its_main_ones(run_script, image_folder):
    flags = (
        '--model',
        'test_resnet',
        '--img-size',
        '32',
        '-b',
        '8',
        '-j',
        '0',
        '--epochs',
        '1',
        '--eed',
        '--aug-splits',
        '2',
    )
    flags += ('--split-bn', '--aa', 'augmix-m3', '--data-dir', image_folder, '--experiment', 'run')
    code, out, err = run_script(train.main, *flags)
    assert code == 0, err
    checkpoint = image_folder.parent / 'output/train/run/last.pth.tar'
    code, again, err = run_script(validate.main, '--checkpoint', checkpoint, '--data-dir', image_folder, '-j', '0')
    assert code == 0, err
    table = [line for line in out.splitlines() if line[:4] in ('0   ', '1   ', '2   ', 'main', 'ens ')]
    assert len(table) == 5
    assert set(table) <= set(again.splitlines())
