"""Training from a repository of the Hub and into one."""

import json

import pytest
import torch
import yaml

import timm_multiexit as tme
from timm_multiexit.checkpoints.save import hash_weights
from timm_multiexit.cli import train, validate

FLAGS = ('--eed', '--img-size', '32', '-b', '8', '-j', '0', '--epochs', '1', '--opt', 'adamw', '--lr', '0.002')
REPO = 'org/net'


@pytest.fixture
def fit(run_script, image_folder):
    def fit(*flags, name='run'):
        return run_script(train.main, *FLAGS, '--data-dir', image_folder, '--experiment', name, *flags)

    return fit


def test_run_is_published_at_its_end(fit, hub, image_folder):
    code, out, err = fit('--model', 'test_resnet', '--push-to-hub', REPO, '--hub-private')
    assert code == 0, err
    assert out.splitlines()[-1].endswith(']')  # timm's tools read the end of the output
    assert hub.repositories[REPO].is_private
    published = tme.create_model(f'hf-hub:{REPO}', pretrained=True).eval()
    best = tme.create_model(f'local-dir:{image_folder.parent}/output/train/run/best', pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    assert all(map(torch.equal, published(images, exits=True).logits, best(images, exits=True).logits))
    assert published.pretrained_cfg['label_names'] == ['cat', 'dog']
    assert published.pretrained_cfg['tag'] == 'eed_images'


def test_run_that_cannot_be_published_in_the_end_is_whole_and_says_how_to_go_on(fit, hub, image_folder):
    hub.fail_next += [('/commit/', 403)]
    flags = ('--push-to-hub', REPO, '--hub-private', '--hub-license', 'mit')
    code, out, err = fit('--model', 'test_resnet', *flags, name='my run')
    folder = image_folder.parent / 'output/train/my run'
    assert code == 2
    assert 'is complete, but was not published' in err.splitlines()[-1]
    command = f"timm-multiexit publish 'output/train/my run' {REPO} --yes --private --license mit"
    assert err.splitlines()[-1].endswith(f'Try again with {command}')
    assert '--result' in out
    assert tme.create_model(f'local-dir:{folder}/best', pretrained=True)
    assert hub.token not in out + err


def test_run_that_goes_on_is_published_without_what_was_measured_before(fit, run_script, hub, image_folder):
    run = image_folder.parent / 'output/train/run'
    assert fit('--model', 'test_resnet')[0] == 0
    flags = ('--model', f'local-dir:{run}/best', '--data-dir', image_folder, '-b', '8', '-j', '0', '--time-rounds', '0')
    outputs = ('--results-file', run / 'validation.json', '--results-format', 'json')
    assert run_script(validate.main, *flags, *outputs)[0] == 0
    # Whichever epoch is the best now, its numbers are those of training or of the same weights.
    code, _, err = fit('--model', 'test_resnet', '--resume', 'auto', '--epochs', '3', '--push-to-hub', REPO)
    assert code == 0, err
    metrics = json.loads(hub.content(hub.repositories[REPO].find('main').files['metrics.json']))
    assert metrics['weights'] == hash_weights(run / 'best') == json.loads((run / 'results.json').read_text())['weights']


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (('--push-to-hub', 'elsewhere/net'), 'elsewhere'),
        (('--push-to-hub', 'a/b/c'), "'a/b/c'"),
        (('--hub-private',), '--hub-private requires --push-to-hub'),
        (('--push-to-hub', REPO, '--hub-license', 'mine'), "got 'mine'"),
    ],
    ids=['namespace', 'name', 'alone', 'license'],
)
def test_what_would_keep_it_from_being_published_is_said_before_the_run(fit, hub, image_folder, flags, message):
    code, _, err = fit('--model', 'test_resnet', *flags)
    assert code == 2
    assert message in err.splitlines()[-1]
    assert not (image_folder.parent / 'output').exists()
    assert not hub.repositories


def test_run_goes_on_from_a_repository_of_one_commit(fit, run_script, hub, image_folder, make_model):
    model = make_model(num_classes=2, input_size=(3, 32, 32)).eval()
    commit = tme.push_to_hub(model, REPO).commit
    frozen = ('--pretrained', '--freeze-backbone', '--opt', 'sgd', '--lr', '0.01')
    code, _, err = fit('--model', f'hf-hub:{REPO}', *frozen)
    assert code == 0, err
    folder = image_folder.parent / 'output/train/run'
    args = yaml.safe_load((folder / 'args.yaml').read_text())
    assert args['model'] == f'hf-hub:{REPO}@{commit}'
    best = tme.create_model(f'local-dir:{folder}/best', pretrained=True)
    state, learned = model.backbone.state_dict(), best.backbone.state_dict()
    assert all(torch.equal(state[key], learned[key]) for key in state)
    assert best.exits.specs == model.exits.specs
    assert not torch.equal(best.exits[0].fc.weight, model.exits[0].fc.weight)
    # what was trained there is where training began: one epoch at this rate does not go far
    assert torch.allclose(best.exits[0].fc.weight, model.exits[0].fc.weight, atol=0.05)
    code, out, err = run_script(
        validate.main, '--model', f'hf-hub:{REPO}', '--data-dir', image_folder, '--split', 'val', '-b', '4', '-j', '0'
    )
    assert code == 0, err
    assert f'hf-hub:{REPO}@{commit} on the val split, 11 images' in out


def test_teacher_comes_from_a_repository_and_never_as_a_pickle(fit, hub, make_backbone):
    tme.push_to_hub(tme.attach_exits(make_backbone(num_classes=2), input_size=(3, 32, 32)), 'org/teacher')
    code, _, err = fit('--model', 'test_resnet', '--kd-model-name', 'hf-hub:org/teacher')
    assert code == 0, err
    hub.add('org/pickle', {'config.json': b'{"architecture": "test_resnet"}', 'pytorch_model.bin': b'code'})
    code, _, err = fit('--model', 'test_resnet', '--kd-model-name', 'hf-hub:org/pickle', name='second')
    assert code == 2
    assert 'org/pickle' in err.splitlines()[-1]
    assert not [entry for entry in hub.log if entry.path.endswith('.bin')]
