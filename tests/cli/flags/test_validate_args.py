"""What cannot be asked of validate.py: flags that do not fit each other, the model, or the files."""

import pytest
from helpers.validation import DATA_CONFIG, make_validator, parse

import timm_multiexit as tme
from timm_multiexit.calibration.stage_costs import StageCosts
from timm_multiexit.cli.flags.validate_args import check_budgets, check_outputs, check_validate_args
from timm_multiexit.utils.errors import MultiExitError


@pytest.fixture
def model(make_model):
    return make_model(exits=[1, 3], input_size=(3, 32, 32)).eval()


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (
            '--threshold 1.5',
            "A threshold of 'confidence' must be .* got 1.5",
        ),
        ('--threshold 0.5,0.6,0.7', 'each of the 2 exits of the model, got 3'),
        ('--threshold 0.5 --criterion patience', "A threshold of 'patience' must be an integer"),
        ('--budget 60', "A budget must be .* got '60'"),
        (
            '--budget 60%',
            '--budget 60% needs data to choose thresholds on: give --calib-split NAME or --calib-from-train N',
        ),
        ('--max-drop 0.01', '--max-drop 0.01 needs data to choose thresholds on'),
        ('--delta 0.1', '--delta needs --max-drop F'),
        ('--seed 0', '--seed needs --calib-from-train N'),
        ('--train-split train --calib-split validation', '--train-split needs --calib-from-train N'),
        ('--calib-split validation --calib-from-train 9', 'exclude each other'),
        ('--criterion margin', '--criterion needs thresholds'),
        ('--combine mean', '--combine needs thresholds'),
    ],
)
def test_flags_that_do_not_fit(flags, message, model):
    with pytest.raises(MultiExitError, match=message) as raised:
        check_validate_args(parse('--model', 'test_resnet', *flags.split()), model, num_processes=1)
    assert '\n' not in str(raised.value)


@pytest.mark.parametrize(
    'flags', ['--threshold 0.5', '--compare a', '--plot p.png', '--calib-split train', '--budget 60%', '--max-drop .1']
)
def test_flags_that_need_exits_and_one_process(flags, model, make_model):
    args = parse('--model', 'net', *flags.split())
    plain = tme.MultiExitModel(model.backbone, [])
    with pytest.raises(MultiExitError, match=f'{flags.split()[0]} needs a model with exits, net has none'):
        check_validate_args(args, plain, num_processes=1)
    with pytest.raises(MultiExitError, match=f'{flags.split()[0]} needs all logits in one process'):
        check_validate_args(args, model, num_processes=2)


@pytest.fixture
def net_folder(model, tmp_path):
    """A folder with a network of the digits."""
    tme.save_pretrained(model, tmp_path / 'net', data_config={**DATA_CONFIG, 'crop_pct': 0.9})
    return tmp_path / 'net'


SAVED = '--save-policy --calib-split validation --budget 90%'


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (
            f'{SAVED} --model test_resnet',
            'needs --model local-dir:FOLDER, got test_resnet',
        ),
        (f'{SAVED} --model hf-hub:org/net@abc', 'needs --model local-dir:FOLDER, got hf-hub:org/net@abc'),
        (f'{SAVED} --checkpoint last.pth.tar', '--save-policy and --checkpoint exclude each other'),
        (f'{SAVED} --exits 2', '--save-policy and --exits exclude each other'),
        (f'{SAVED} --gp max', '--save-policy and --gp exclude each other'),
        ('--save-policy --budget 90%', '--save-policy needs data to choose thresholds on: give --calib-split NAME or'),
        ('--save-policy --calib-split validation --threshold 0.9', 'needs a policy to save. Give --budget B or'),
    ],
)
def test_policies_that_are_not_the_folders_are_not_saved(flags, message, model, net_folder):
    args = parse('--model', f'local-dir:{net_folder}', *flags.split())
    with pytest.raises(MultiExitError, match=message) as raised:
        check_validate_args(args, model, num_processes=1)
    assert '\n' not in str(raised.value)


def test_policy_of_other_classes_or_no_exits_is_not_saved(make_model, model, net_folder):
    args = parse('--model', f'local-dir:{net_folder}', *SAVED.split())
    with pytest.raises(MultiExitError, match="the folder's own classes, got 7 others. Leave out --num-classes"):
        check_validate_args(args, make_model(exits=[1, 3], num_classes=7), num_processes=1)
    with pytest.raises(MultiExitError, match='holds a plain timm model'):
        check_validate_args(args, tme.MultiExitModel(model.backbone, []), num_processes=1)
    check_validate_args(args, model, num_processes=1)
    with pytest.raises(MultiExitError, match='needs all logits in one process'):
        check_validate_args(args, model, num_processes=2)


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ('--crop-pct 0.9 --img-size 32', None),
        ('--crop-pct 0.8', 'own crop_pct 0.9, got 0.8'),
        ('--img-size 64', r'own input_size \[3, 32, 32\], got \[3, 64, 64\]'),
        ('--mean 0.1', r'own mean \[0.5, 0.5, 0.5\], got \[0.1, 0.1, 0.1\]'),
    ],
)
def test_policy_is_saved_for_images_as_the_folder_has_them_alone(flags, message, net_folder):
    model = tme.create_model(f'local-dir:{net_folder}', pretrained=True).eval()
    args = parse('--model', f'local-dir:{net_folder}', *SAVED.split(), *flags.split())
    if message is None:
        make_validator(args, model)
    else:
        with pytest.raises(MultiExitError, match=message):
            make_validator(args, model)


@pytest.mark.parametrize(
    ('flags', 'num'),
    [
        ('', 0),
        ('--img-size 64', 1),
        ('--img-size 64 --mean 0.1', 2),
        ('--img-size 64 --threshold 0.5', 0),
        ('--img-size 64 --calib-split validation', 0),
    ],
)
def test_thresholds_of_other_images_are_warned_of(flags, num, net_folder, caplog):
    model = tme.create_model(f'local-dir:{net_folder}', pretrained=True).eval()
    model.policy = tme.ExitPolicy('confidence', (0.5,) * len(model.exits))
    make_validator(parse('--model', f'local-dir:{net_folder}', *flags.split()), model)
    lines = [record.message for record in caplog.records if "model's thresholds were chosen on" in record.message]
    assert len(lines) == num
    assert all('images of input_size [3, 32, 32], got [3, 64, 64]: to choose' in line for line in lines[:1])


@pytest.mark.parametrize('budget', ['3%', '0.001MMACs', '500%', '9TMACs'])
def test_budgets_that_no_policy_meets_are_refused_before_evaluation(budget, model):
    costs = StageCosts.from_exit_costs(model.cost())
    args = parse('--model', 'test_resnet', '--calib-split', 'validation', '--budget', budget)
    with pytest.raises(MultiExitError, match=f'The budget must be .* got {budget}, which is') as raised:
        check_budgets(args, model, costs)
    assert '\n' not in str(raised.value)


def test_budgets_from_always_the_first_exit_to_main_with_all_heads_are_possible(model):
    costs = StageCosts.from_exit_costs(model.cost())
    lowest, highest = model.cost()[0].fixed.macs, model.cost()[-1].sequential.macs
    for macs, is_possible in ((lowest - 1, False), (lowest, True), (highest, True), (highest + 1, False)):
        args = parse('--model', 'test_resnet', '--calib-split', 'validation', '--budget', '9ms', f'{macs}MACs')
        if is_possible:
            check_budgets(args, model, costs)
        else:
            with pytest.raises(MultiExitError, match='The budget'):
                check_budgets(args, model, costs)


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ('--plot folder', 'folder must be the path of a file, got a folder'),
        ('--results-file folder', 'folder must be the path of a file, got a folder'),
        ('--results-file file/rows.csv', 'Cannot write file/rows.csv: '),
        ('--plot file/deep/er/a.png', 'Cannot write file/deep/er/a.png: '),
        (f'--results-file {"x" * 254}', 'Cannot write x+: File name too long'),
        ('--results-file new/accuracy_vs_macs.png', 'is the path of the picture too'),
        ('--results-file a --plot ./a', 'is the path of the picture too'),
        (
            '--results-file net/config.json --model local-dir:net --save-policy',
            'net/config.json is the path of the configuration of the model too. Give the results another one',
        ),
        ('--model local-dir:file --save-policy', 'Cannot write file/config.json: '),
    ],
)
def test_paths_that_cannot_be_written_are_known_before(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'file').write_text('mine')
    with pytest.raises(MultiExitError, match=message) as raised:
        check_outputs(parse('--model', 'test_resnet', *flags.split()))
    assert '\n' not in str(raised.value)
    assert (tmp_path / 'file').read_text() == 'mine'


def test_checking_paths_leaves_files_as_they_are(tmp_path):
    (tmp_path / 'rows.csv').write_text('old')
    check_outputs(parse('--model', 'a', '--results-file', f'{tmp_path}/rows.csv', '--plot', f'{tmp_path}/new/a.png'))
    assert sorted(path.name for path in tmp_path.rglob('*')) == ['new', 'rows.csv']
    assert (tmp_path / 'rows.csv').read_text() == 'old'
