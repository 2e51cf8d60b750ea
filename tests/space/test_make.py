"""hub/space/make.py: what the folder of a page has, and what it refuses. Without a browser."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import yaml
from PIL import Image

from hub.space import make
from timm_multiexit.deploy.manifest import write_manifest
from timm_multiexit.utils.errors import CheckpointError, DataError, InvalidValueError, MissingFileError

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / 'hub/space/page').iterdir())


def write_export(folder, *, channels=3, classes=('cat', 'dog'), forms=('stages',)):
    """Write an exported folder with a manifest that holds, and files that are no programs."""
    paths = [f'stages/{name}.onnx' for name in ('exit_0', 'main')]
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(path.encode() * 100)
    macs = ((10, 10), (40, 43))
    write_manifest(
        folder,
        {
            'format': 1,
            'name': 'resnet10t',
            'versions': dict.fromkeys(('timm_multiexit', 'timm', 'torch', 'onnx', 'onnxruntime'), '1.0'),
            'opset': 20,
            'num_classes': len(classes),
            'classes': list(classes),
            'preprocessing': {
                'input_size': [channels, 32, 32],
                'interpolation': 'bicubic',
                'crop_pct': 1.0,
                'crop_mode': 'center',
                'mean': [0.5] * channels,
                'std': [0.5] * channels,
            },
            'exits': [
                {'name': name, 'macs': {'fixed': fixed, 'sequential': sequential}, 'params': 5}
                for name, (fixed, sequential) in zip(('exit 0', 'main'), macs)
            ],
            'plain_macs': 40,
            'policy': None,
            'budgets': [],
            'programs': {
                'fp32': {**{form: paths if form in forms else [] for form in ('fixed', 'stages')}, 'conditional': None}
            },
            'pt2': None,
            'int8': None,
        },
    )
    return folder


@pytest.fixture
def libraries(tmp_path):
    """A folder as npm fills it."""
    folder = tmp_path / 'node_modules'
    for name in make.LIBRARIES.values():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    (folder / 'onnxruntime-web/package.json').write_text('{"version": "1.2.3"}')
    return folder


@pytest.fixture
def build(tmp_path, libraries):
    """Return a function that makes a page of an export and returns (its folder, its page.json)."""

    def start(export=None, **options):
        export = export or write_export(tmp_path / 'export')
        return tmp_path / 'page', make.make_page(export, tmp_path / 'page', libraries=libraries, **options)

    return start


@pytest.fixture
def photos(tmp_path):
    """A photo of a camera, turned and with a place, in a folder of its class; a small exact picture beside it."""
    folder = tmp_path / 'photos'
    (folder / 'dog').mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, 'Maker of cameras'  # turned by a quarter
    Image.new('RGB', (900, 300), 'red').save(folder / 'dog/my_dog-1.jpg', exif=exif)
    Image.new('L', (8, 8), 77).save(folder / 'dot.png')
    return folder


def test_page_has_sources_programs_and_libraries(build, tmp_path):
    folder, page = build()
    assert len(SOURCES) >= 8
    for source in SOURCES:
        assert (folder / source.name).read_bytes() == source.read_bytes()
    for name, origin in make.LIBRARIES.items():
        assert (folder / 'vendor' / name).read_text() == origin
    manifest = json.loads((folder / 'model/manifest.json').read_text())
    stages = manifest['programs']['fp32']['stages']
    assert stages == ['stages/exit_0.onnx', 'stages/main.onnx']
    for path in stages:
        content = (folder / 'model' / path).read_bytes()
        assert hashlib.sha256(content).hexdigest() == manifest['files'][path]['sha256']
    wanted = {'title': 'resnet10t', 'precision': 'fp32', 'drawing': 'none', 'onnxruntime': '1.2.3', 'examples': []}
    assert page == json.loads((folder / 'page.json').read_text()) == wanted
    assert re.findall(r'^\*\.(\w+) filter=lfs', (folder / '.gitattributes').read_text(), re.M)[:2] == ['onnx', 'wasm']


def test_readme_makes_it_a_static_space(build):
    folder, _ = build(title='Exits: "a" test', repo='org/name', license='apache-2.0')
    _, front, text = (folder / 'README.md').read_text(encoding='utf-8').split('---\n', 2)
    values = yaml.safe_load(front)
    assert values['sdk'] == 'static'
    assert (folder / values['app_file']).is_file()
    assert (values['title'], values['license'], values['models']) == ('Exits: "a" test', 'apache-2.0', ['org/name'])
    colors = {'red', 'yellow', 'green', 'blue', 'indigo', 'purple', 'pink', 'gray'}  # the Hub's
    assert {values['colorFrom'], values['colorTo']} <= colors
    assert len(values['short_description']) <= 60
    assert text.startswith('\n# Exits: "a" test\n')


def test_examples_are_upright_small_labelled_and_without_a_place(build, photos):
    folder, page = build(examples=photos)
    assert page['examples'] == [
        {'file': 'examples/00.jpg', 'label': 1, 'name': 'my dog 1'},
        {'file': 'examples/01.png', 'label': None, 'name': 'dot'},
    ]
    with Image.open(folder / 'examples/00.jpg') as picture:
        assert picture.size == (160, 480)
        assert dict(picture.getexif()) == {}
    assert b'Maker' not in (folder / 'examples/00.jpg').read_bytes()
    with Image.open(folder / 'examples/01.png') as picture:
        assert (picture.size, picture.getpixel((0, 0))) == ((8, 8), (77, 77, 77))


def test_digits_are_drawn_where_the_classes_are_digits(build, tmp_path):
    assert build(write_export(tmp_path / 'digits', classes=make.DIGITS))[1]['drawing'] == 'digits'
    assert build(drawing='plain')[1]['drawing'] == 'plain'


def test_page_replaces_a_page_and_nothing_else(build, tmp_path):
    folder, _ = build()
    (folder / 'examples').mkdir(exist_ok=True)
    (folder / 'examples/stray.jpg').write_text('of an older page')
    build()
    assert not (folder / 'examples/stray.jpg').exists()
    (folder / 'notes.txt').write_text('mine')
    with pytest.raises(InvalidValueError, match='holds other files, such as notes.txt'):
        build()
    (folder / 'notes.txt').unlink()
    (folder / 'page.json').unlink()
    with pytest.raises(InvalidValueError, match='holds other files'):
        build()
    assert (folder / 'index.html').is_file()


def test_only_own_files_are_named_in_the_sources():
    texts = {path.name: path.read_text(encoding='utf-8') for path in SOURCES}
    assert {name for name, text in texts.items() if re.search(r'(https?:)?//[a-z0-9-]+\.[a-z]', text)} == set()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', texts['index.html'])[1]
    rules = dict(rule.split(' ', 1) for rule in policy.split('; '))
    assert rules['default-src'] == "'none'"
    assert rules['connect-src'] == "'self'"
    assert rules['script-src'] == "'self' 'wasm-unsafe-eval'"


def test_lock_names_no_registry_and_what_package_json_asks_for():
    package = json.loads((ROOT / 'hub/space/package.json').read_text())
    lock = (ROOT / 'hub/space/package-lock.json').read_text()
    assert 'resolved' not in lock
    assert 'registry' not in lock
    found = {name: json.loads(lock)['packages'][f'node_modules/{name}'] for name in package['dependencies']}
    assert {name: each['version'] for name, each in found.items()} == package['dependencies']
    assert all(each['integrity'].startswith('sha512-') for each in found.values())


@pytest.mark.parametrize(
    'what', ['no manifest', 'changed', 'no stages', 'channels', 'int8', 'no examples', 'text', 'npm']
)
def test_what_cannot_become_a_page_is_refused_before_anything_is_written(what, build, tmp_path, photos, libraries):
    export, options = write_export(tmp_path / 'export'), {}
    if what == 'no manifest':
        (export / 'manifest.json').unlink()
        kind, message = CheckpointError, 'manifest.json'
    elif what == 'changed':
        (export / 'stages/main.onnx').write_bytes(b'other')
        kind, message = CheckpointError, 'main.onnx'
    elif what == 'no stages':
        write_export(export, forms=('fixed',))
        kind, message = InvalidValueError, "form 'stages'"
    elif what == 'channels':
        write_export(export, channels=4)
        kind, message = InvalidValueError, '1 or 3 channels, got 4'
    elif what == 'int8':
        options['precision'] = 'int8'
        kind, message = InvalidValueError, 'the export has it in: fp32'
    elif what == 'no examples':
        options['examples'] = tmp_path / 'nowhere'
        kind, message = MissingFileError, 'nowhere, the folder of the examples'
    elif what == 'text':
        (photos / 'dog/notes.png').write_text('not a picture')
        options['examples'] = photos
        kind, message = DataError, 'notes.png is not a picture'
    else:
        (libraries / make.LIBRARIES['geist.woff2']).unlink()
        kind, message = MissingFileError, 'Run npm ci'
    with pytest.raises(kind, match=re.escape(message)) as error:
        build(export, **options)
    assert '\n' not in str(error.value)
    assert not (tmp_path / 'page').exists()


def test_command_says_how_to_look_at_the_page(tmp_path, libraries, photos, capsys, monkeypatch):
    monkeypatch.setattr(make, 'install_libraries', lambda folder: '1.2.3')
    monkeypatch.setattr(make, 'make_page', lambda *args, **options: original(*args, **options, libraries=libraries))
    export = write_export(tmp_path / 'export')
    assert make.main([str(export), str(tmp_path / 'page'), '--examples', str(photos)]) == 0
    assert 'python -m http.server' in capsys.readouterr().out
    assert make.main([str(tmp_path / 'nothing'), str(tmp_path / 'page')]) == 2
    assert capsys.readouterr().err.count('\n') == 1


original = make.make_page
