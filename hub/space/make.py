#!/usr/bin/env python3
"""Make a demo page of an exported network: `hub/space/make.py EXPORT_FOLDER OUT --examples PICTURES`.

OUT is a folder of plain files that needs no server of its own: look at it with `python -m http.server --directory OUT`,
or upload it to the Hugging Face Hub as a static Space. The network runs in the browser by ONNX Runtime Web, which npm
installs here at the first call; the page makes no request to another host.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from PIL import Image, ImageOps

from timm_multiexit.deploy.manifest import MANIFEST_NAME, read_manifest
from timm_multiexit.utils.errors import DataError, InvalidValueError, MissingFileError, MultiExitError, one_line
from timm_multiexit.utils.files import new_folder

HERE = Path(__file__).parent

# Name in the page -> file of an npm package; of ONNX Runtime what runs on one thread of a CPU.
LIBRARIES = {
    'ort.wasm.min.mjs': 'onnxruntime-web/dist/ort.wasm.min.mjs',
    'ort-wasm-simd-threaded.mjs': 'onnxruntime-web/dist/ort-wasm-simd-threaded.mjs',
    'ort-wasm-simd-threaded.wasm': 'onnxruntime-web/dist/ort-wasm-simd-threaded.wasm',
    'geist.woff2': '@fontsource-variable/geist/files/geist-latin-wght-normal.woff2',
    'geist.LICENSE': '@fontsource-variable/geist/LICENSE',
}

# All files that a page may hold.
OWNED_FILES = (
    *('page.json', 'README.md', '.gitattributes', 'vendor/*', 'model/*', 'examples/*'),
    *(path.name for path in sorted((HERE / 'page').iterdir())),
)

PICTURES = {'.png', '.jpg', '.jpeg', '.webp', '.bmp', '.gif', '.tif', '.tiff'}
MAX_EXAMPLES = 24
EXAMPLE_SIZE = 480  # pixels of the longer side
DIGITS = [str(digit) for digit in range(10)]


def main(argv: list[str] | None = None) -> int:
    """Make the page; returns the exit status."""
    args = _parse_args(argv)
    try:
        page = make_page(
            args.export_folder,
            args.out,
            examples=args.examples,
            drawing=args.drawing,
            precision=args.precision,
            title=args.title,
            repo=args.repo,
            license=args.license,
        )
    except MultiExitError as error:
        print(f'{Path(__file__).name}: error: {error}', file=sys.stderr)
        return 2
    size = sum(path.stat().st_size for path in args.out.rglob('*') if path.is_file())
    print(f'{args.out}: {page["title"]}, {len(page["examples"])} examples, {size / 2**20:.1f} MiB')
    print(f'Look at it:  python -m http.server --bind 127.0.0.1 --directory {args.out}')
    print(f'Publish it:  hf upload ORG/NAME {args.out} . --repo-type space')
    return 0


def _parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Make a static demo page of an exported network.')
    parser.add_argument('export_folder', type=Path, help='what timm-multiexit export wrote, with the form "stages"')
    parser.add_argument('out', type=Path, help='folder of the page; an older page in it is replaced')
    parser.add_argument(
        '--examples',
        type=Path,
        metavar='FOLDER',
        help=f'up to {MAX_EXAMPLES} pictures, or folders of them named after their classes, which judges the answers',
    )
    parser.add_argument(
        '--drawing',
        choices=('auto', 'digits', 'plain', 'none'),
        default='auto',
        help='a pad to draw on: "digits" prepares what is drawn as scikit-learn prepared its digits, "plain" takes it'
        ' as it is, white on black; "auto" is "digits" where the classes are 0 to 9 (default: %(default)s)',
    )
    parser.add_argument('--precision', choices=('fp32', 'int8'), default='fp32', help='default: %(default)s')
    parser.add_argument('--title', help='default: the name in the manifest')
    parser.add_argument('--repo', metavar='ORG/NAME', help='the model on the Hub, which the Space then links to')
    parser.add_argument('--license', metavar='ID', help="of the network, by the Hub's names, such as apache-2.0")
    return parser.parse_args(argv)


def make_page(
    export_folder: Path,
    out: Path,
    *,
    examples: Path | None = None,
    drawing: str = 'auto',
    precision: str = 'fp32',
    title: str | None = None,
    repo: str | None = None,
    license: str | None = None,
    libraries: Path = HERE / 'node_modules',
) -> dict[str, Any]:
    """Write the page and return the content of its `page.json`; the arguments are those of the command line.

    Raises:
        CheckpointError: The folder is not an export, or was changed.
        MissingFileError: The examples or npm are missing.
        InvalidValueError: The export has no stages of this precision, or images of other channels.
        DataError: There are no examples in their folder, or one is not a picture.
        DiskError: The page could not be written.
    """
    manifest = read_manifest(export_folder)
    _check_manifest(manifest, precision)
    if drawing == 'auto':
        drawing = 'digits' if manifest['classes'] == DIGITS else 'none'
    version = install_libraries(libraries)
    with new_folder(out, ('page.json', 'index.html'), OWNED_FILES) as draft:
        shutil.copytree(HERE / 'page', draft, dirs_exist_ok=True)
        _copy(libraries, LIBRARIES, draft / 'vendor')
        stages = manifest['programs'][precision]['stages']
        _copy(export_folder, {path: path for path in (MANIFEST_NAME, *stages)}, draft / 'model')
        page = {
            'title': title or manifest['name'],
            'precision': precision,
            'drawing': drawing,
            'onnxruntime': version,
            'examples': _write_examples(examples, draft / 'examples', manifest['classes']) if examples else [],
        }
        (draft / 'page.json').write_text(json.dumps(page, indent=1) + '\n', encoding='utf-8')
        (draft / 'README.md').write_text(_describe(page, manifest, repo, license), encoding='utf-8')
        # The Hub keeps large files apart.
        kinds = ('*.onnx', '*.wasm', '*.woff2', '*.png', '*.jpg')
        rules = ''.join(f'{kind} filter=lfs diff=lfs merge=lfs -text\n' for kind in kinds)
        (draft / '.gitattributes').write_text(rules, encoding='utf-8')
    return page


def _check_manifest(manifest: dict[str, Any], precision: str) -> None:
    programs = manifest['programs'].get(precision)
    if programs is None or not programs['stages']:
        made = ', '.join(name for name, forms in manifest['programs'].items() if forms['stages']) or 'none'
        raise InvalidValueError(
            f"The page needs the form 'stages' in {precision}; the export has it in: {made}. Export with --forms stages"
            f'{" and quantize" if precision == "int8" else ""}.'
        )
    channels = manifest['preprocessing']['input_size'][0]
    if channels not in (1, 3):
        raise InvalidValueError(f'The images must have 1 or 3 channels, got {channels}.')


def install_libraries(folder: Path) -> str:
    """Return the version of ONNX Runtime Web in a folder of npm packages, installed if it is the one beside this file.

    Raises:
        MissingFileError: Packages are missing, and npm with them or another folder was given.
    """
    locked = json.loads((HERE / 'package.json').read_text(encoding='utf-8'))['dependencies']
    if folder == HERE / 'node_modules' and any(_find_version(folder / name) != locked[name] for name in locked):
        npm = shutil.which('npm')
        if npm is None:
            raise MissingFileError(
                f'The page needs {", ".join(locked)} in {folder}. Install Node.js, which brings npm.'
            )
        # Nothing that a package brings is run.
        done = subprocess.run([npm, 'ci', '--ignore-scripts', '--no-audit', '--no-fund'], cwd=HERE, text=True)
        if done.returncode:
            raise MissingFileError(f'npm ci failed in {HERE}. Its own message is above.')
    missing = [name for name in LIBRARIES.values() if not (folder / name).is_file()]
    version = _find_version(folder / 'onnxruntime-web')
    if missing or version is None:
        raise MissingFileError(f'{folder / (missing or ["onnxruntime-web"])[0]} does not exist. Run npm ci in {HERE}.')
    return version


def _find_version(package: Path) -> str | None:
    path = package / 'package.json'
    return json.loads(path.read_text(encoding='utf-8'))['version'] if path.is_file() else None


def _copy(source: Path, names: dict[str, str], target: Path) -> None:
    for name, origin in names.items():
        if not (source / origin).is_file():
            raise MissingFileError(f'{source / origin} does not exist.')
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / origin, target / name)


def _write_examples(folder: Path, target: Path, classes: list[str] | None) -> list[dict[str, Any]]:
    """Write the pictures of a folder without what cameras add to them (places, names), and describe them."""
    if not folder.is_dir():
        raise MissingFileError(f'{folder}, the folder of the examples, does not exist.')
    paths = sorted(path for path in folder.rglob('*') if path.suffix.lower() in PICTURES and path.is_file())
    if not paths or len(paths) > MAX_EXAMPLES:
        raise DataError(f'{folder} must have 1 to {MAX_EXAMPLES} pictures ({", ".join(PICTURES)}), got {len(paths)}.')
    target.mkdir()
    examples = []
    for idx, path in enumerate(paths):
        try:
            with Image.open(path) as opened:
                is_lossless = opened.format != 'JPEG'
                picture = ImageOps.exif_transpose(opened).convert('RGB')
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f'{path} is not a picture that can be read: {one_line(error)}.') from error
        is_small = max(picture.size) <= EXAMPLE_SIZE
        picture.thumbnail((EXAMPLE_SIZE, EXAMPLE_SIZE), Image.Resampling.LANCZOS)
        # What is small and exact stays exact.
        name = f'{idx:02}.png' if is_lossless and is_small else f'{idx:02}.jpg'
        picture.info.clear()
        picture.save(target / name, **({'optimize': True} if name.endswith('png') else {'quality': 90}))
        label = classes.index(path.parent.name) if classes and path.parent.name in classes else None
        text = re.sub(r'[\W_]+', ' ', path.stem).strip()
        examples.append({'file': f'examples/{name}', 'label': label, 'name': text or f'example {idx + 1}'})
    return examples


def _describe(page: dict[str, Any], manifest: dict[str, Any], repo: str | None, license: str | None) -> str:
    """Return the README.md of a static Space: its front matter, and what the page is."""
    front: dict[str, Any] = {
        'title': page['title'],
        'emoji': '🛣️',
        'colorFrom': 'indigo',
        'colorTo': 'green',
        'sdk': 'static',
        'app_file': 'index.html',
        'pinned': False,
        'short_description': 'A classifier that stops as soon as it is sure',
        'tags': ['timm', 'early-exit', 'onnx', 'onnxruntime-web'],
    }
    front |= {'license': license} if license else {}
    front |= {'models': [repo]} if repo else {}
    text = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    size = ' x '.join(map(str, manifest['preprocessing']['input_size'][1:]))
    return (
        f'---\n{text}---\n\n# {page["title"]}\n\n'
        f'An image classifier with {len(manifest["exits"])} exits ({manifest["num_classes"]} classes, {size} pixels)'
        ' that runs in the browser, by\nONNX Runtime Web, and stops as soon as its policy is satisfied. It needs'
        ' no server: pictures stay on the device that\nshows the page.\n\n'
        'Made with timm_multiexit, by `hub/space/make.py`. To look at it from a copy of this folder:'
        ' `python -m http.server`.\n'
    )


if __name__ == '__main__':
    sys.exit(main())
