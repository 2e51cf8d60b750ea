"""Exported programs from a repository of the Hugging Face Hub, which is not trusted."""

import os
import shutil
from pathlib import PurePosixPath

from timm_multiexit.deploy import runner
from timm_multiexit.deploy.manifest import EXPORT_FILES, EXPORT_MARKS, MANIFEST_NAME, RUNNER_NAME, write_manifest
from timm_multiexit.hub_client.client import fetch_files
from timm_multiexit.utils.checks import check_path
from timm_multiexit.utils.errors import CheckpointError
from timm_multiexit.utils.files import new_folder

REMOTE_FOLDER = 'onnx'


def fetch_export(
    repo_id: str,
    folder: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> str:
    """Write the programs that were published with a model into a folder, as `export` would, and return their commit.

    The manifest is checked before anything else is downloaded, and then what it lists: ONNX files alone, of one commit,
    with the sizes and checksums that it says. Nothing of the repository is run: `runner.py` is that of this package.

    Args:
        repo_id: namespace/name of what `timm-multiexit publish --onnx` published.
        folder: Where to write; an exported folder is replaced, others must be empty.
        revision: Branch, tag or commit; None for main.
        cache_dir: The cache of the Hub's client; None for its own.

    Raises:
        HubError: The repository does not exist, or has no programs.
        CheckpointError: The manifest says something that is not allowed, or a file is not what it says.
        InvalidValueError: The folder holds other files.
        DiskError: The disk is full or not writable.
    """
    check_path('folder', folder)
    snapshot = fetch_files(repo_id, [f'{REMOTE_FOLDER}/{MANIFEST_NAME}'], revision=revision, cache_dir=cache_dir)
    source = snapshot.folder / REMOTE_FOLDER
    try:
        manifest = runner.load_manifest(source)
        names = [name for name in manifest['files'] if name != RUNNER_NAME]
        wrong = next((name for name in names if PurePosixPath(name).suffix != '.onnx'), None)
        if wrong is not None:
            raise CheckpointError(f"'{repo_id}' must list programs of ONNX alone in its manifest, got {wrong}.")
        paths = [f'{REMOTE_FOLDER}/{name}' for name in names]
        fetch_files(repo_id, paths, revision=snapshot.commit, cache_dir=cache_dir)
        with new_folder(folder, EXPORT_MARKS, EXPORT_FILES) as draft:
            for name in names:
                (draft / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, draft / name)
            runner.check_files(draft, manifest)
            shutil.copyfile(runner.__file__, draft / RUNNER_NAME)
            write_manifest(draft, manifest)
    except runner.RunnerError as error:
        raise CheckpointError(f"The programs of '{repo_id}' cannot be used: {error}") from error
    return snapshot.commit
