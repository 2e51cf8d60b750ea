"""What goes over the network: files of one commit from the Hugging Face Hub, and a folder to it as one commit.

Who asks is told by `huggingface_hub`: the token of `hf auth login` or HF_TOKEN, the server of HF_ENDPOINT, the cache of
HF_HOME. Every failure is a `MultiExitError` of one line, without a token in it, that is raised from the client's own.
"""

import os
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import ModelInfo

from timm_multiexit.hub_client.errors import (
    check_repo_id,
    check_revision,
    check_token,
    endpoint,
    explain_hub_errors,
    is_token_refused,
)
from timm_multiexit.hub_client.files import Change, RemoteFile, check_file_name, check_owned, compare, local_files
from timm_multiexit.utils.errors import MultiExitError

_COMMIT = re.compile(r'[0-9a-f]{40}')


class Snapshot(NamedTuple):
    """Files of one commit, in the cache.

    Attributes:
        folder: Where they lie, read-only by agreement: a later call gives the same files.
        commit: The commit, 40 hex digits.
    """

    folder: Path
    commit: str


class PushPlan(NamedTuple):
    """What a push would do.

    Attributes:
        repo_id: namespace/name.
        endpoint: Address of the server.
        exists: Whether the token sees such a repository.
        parent: Commit that the push would come after, or None without a repository.
        changes: One per file, by path; files of the repository that a push leaves alone are not among them.
    """

    repo_id: str
    endpoint: str
    exists: bool
    parent: str | None
    changes: tuple[Change, ...]


class PushResult(NamedTuple):
    """What a push did.

    Attributes:
        repo_id: namespace/name.
        commit: The commit that holds the folder, 40 hex digits.
        url: Page of the repository at this commit.
        has_changed: False where the repository held the folder before.
    """

    repo_id: str
    commit: str
    url: str
    has_changed: bool


def fetch_files(
    repo_id: str,
    file_names: Sequence[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> Snapshot:
    """Return files of a model repository as one commit has them, from the cache where it holds them.

    The first file settles which commit a branch or tag means, the others are taken at that commit. Without a network,
    with HF_HUB_OFFLINE or where the server fails, a branch means the commit that it meant last.

    Args:
        repo_id: namespace/name.
        file_names: Names in the root of the repository.
        revision: Branch, tag or commit; None for main.
        cache_dir: The cache's folder; None for the client's own.

    Raises:
        MultiExitError: Name or revision of a wrong form, a format that can hold code (pickles), no such repository,
            revision or file, no access, or neither the server nor the cache has it.

    >>> fetch_files('org/name', ['model.bin'])
    Traceback (most recent call last):
        ...
    timm_multiexit.config.MultiExitError: 'model.bin' is of a format that may hold code: give or write safetensors.
    """
    check_repo_id(repo_id)
    if revision is not None:
        check_revision(revision)
    for name in file_names:
        check_file_name(name)
    if not file_names:
        raise MultiExitError(f"No file of '{repo_id}' was asked for: give one name or more.")
    check_token(None, repo_id)
    snapshot = None
    for name in file_names:
        with explain_hub_errors(repo_id, revision or 'main', name):
            folder = _fetch_file(repo_id, name, snapshot.commit if snapshot else revision, cache_dir).parent
        if not _COMMIT.fullmatch(folder.name) or (snapshot and folder.name != snapshot.commit):
            raise MultiExitError(f"{endpoint()} gave no commit for {name} of '{repo_id}': check HF_ENDPOINT.")
        snapshot = Snapshot(folder, folder.name)
    return snapshot


def _fetch_file(repo_id: str, name: str, revision: str | None, cache_dir: str | os.PathLike | None) -> Path:
    try:
        return Path(hf_hub_download(repo_id, name, revision=revision, cache_dir=cache_dir, **_library()))
    except HTTPError as error:
        # The client looks into its cache where no connection can be made, not where one breaks.
        cached = try_to_load_from_cache(repo_id, name, cache_dir=cache_dir, revision=revision)
        if isinstance(error, HfHubHTTPError) or not isinstance(cached, str):
            raise
        return Path(cached)


def check_push(repo_id: str, *, token: str | None = None, private: bool = False) -> str:
    """Return namespace/name of a repository that may be pushed to; changes nothing.

    A fine-grained token tells its rights to the server alone: `push_folder` hears of a missing one from it.

    Args:
        repo_id: Name, of the logged-in user then, or namespace/name.
        token: None for the one that is logged in.
        private: Whether it will be pushed to as private.

    Raises:
        MultiExitError: Name of a wrong form, not logged in, a token that the server does not take or that only reads,
            a namespace that is neither the user's nor an organization's to write to, a repository of something else
            than a publication, or a public one with `private`.
    """
    check_repo_id(repo_id)
    check_token(token, repo_id, is_required=True)
    with explain_hub_errors(repo_id):
        answer = _api(token).whoami()
        user, auth = answer['name'], (answer.get('auth') or {}).get('accessToken') or {}
        writable = [org['name'] for org in answer.get('orgs') or () if org.get('roleInOrg') != 'read']
    if auth.get('role') == 'read':
        raise MultiExitError(f"The token of '{user}' only reads: make one that writes at {endpoint()}/settings/tokens.")
    namespace, _, name = repo_id.rpartition('/')
    if namespace not in ('', user, *writable):
        names = ', '.join(f"'{each}'" for each in [user, *sorted(writable)[:10]])
        raise MultiExitError(f"'{user}' may not write to '{namespace}', allowed are {names}.")
    repo_id = f'{namespace or user}/{name}'
    _read_remote(_api(token), repo_id, private=private)
    return repo_id


def full_name(repo_id: str, *, token: str | None = None) -> str:
    """Return namespace/name; of a bare name the server says whose it is, since nobody may write there but the user.

    Raises:
        MultiExitError: Name of a wrong form; for a bare one, see `check_push`.
    """
    check_repo_id(repo_id)
    if '/' in repo_id:
        return repo_id
    try:
        check_token(token, repo_id, is_required=True)
        with explain_hub_errors(repo_id):
            return f'{_api(token).whoami()["name"]}/{repo_id}'
    except MultiExitError as error:
        raise MultiExitError(f"'{repo_id}' names no user: give namespace/name. {error}") from error


def plan_push(folder: str | os.PathLike, repo_id: str, *, token: str | None = None, private: bool = False) -> PushPlan:
    """Return what `push_folder` would do with a folder; changes nothing.

    Args:
        folder: A publication; its files go, with those of its folders, except hidden ones.
        repo_id: See `check_push`.
        token: None for the one that is logged in; a private repository is not seen without.
        private: See `push_folder`.

    Raises:
        MultiExitError: It is no publication, a file may hold code, is a link out of the folder or has a name that is
            not taken; the repository holds something else than a publication, or is public with `private`; the server
            cannot be reached or does not take the token.
    """
    files = local_files(Path(folder))
    repo_id = full_name(repo_id, token=token)
    return _plan(files, repo_id, _read_remote(_api(token), repo_id, private=private))


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool = False,
    tag: str | None = None,
    message: str = 'Publish with timm_multiexit',
    token: str | None = None,
) -> PushResult:
    """Make a repository hold a folder, by one commit or by none where it does already.

    Changed files alone are sent. What is gone from the folder is deleted there if it is one of the files that a
    publication writes (`hub_files.OWNED_FILES`); all others stay. Until the commit, which is the last step but the tag,
    the repository stays as it was; after a break run again.

    Args:
        folder: See `plan_push`.
        repo_id: See `check_push`; the repository is made if there is none.
        private: Make a private repository. One that is there stays as it is.
        tag: Name that the commit gets as well; one that this commit has already is fine.
        message: Title of the commit.
        token: None for the one that is logged in.

    Raises:
        MultiExitError: See `plan_push`; a tag that another commit has, or the name of a branch; someone else's commit
            in between; no right to write.
    """
    if tag is not None:
        check_revision(tag, 'Tag')
    check_token(token, repo_id, is_required=True)
    files = local_files(Path(folder))
    repo_id = full_name(repo_id, token=token)
    api = _api(token)
    info = _read_remote(api, repo_id, private=private)
    changes = _plan(files, repo_id, info).changes
    has_changes = any(change.action != 'keep' for change in changes)
    has_tag = tag is not None and _find_tag(api, repo_id, tag, info, has_changes=has_changes)
    with explain_hub_errors(repo_id):
        if info is None:
            # None leaves it to the organization, some of which allow private ones alone.
            api.create_repo(repo_id, private=private or None)
            info = api.model_info(repo_id)
            if private and not info.private:
                raise MultiExitError(f"'{repo_id}' was made public by {endpoint()}, so nothing was pushed: delete it.")
        commit = _commit(api, repo_id, files, changes, info.sha, message) if has_changes else info.sha
    if tag is not None and not has_tag:
        with explain_hub_errors(repo_id, before=f'Commit {commit} is pushed, its tag is not. '):
            api.create_tag(repo_id, tag=tag, revision=commit)
    return PushResult(repo_id, commit, f'{endpoint()}/{repo_id}/tree/{commit}', commit != info.sha)


def _commit(
    api: HfApi, repo_id: str, files: dict[str, Path], changes: tuple[Change, ...], parent: str, message: str
) -> str:
    """Send the changes as one commit after `parent` and return it."""
    operations: list[CommitOperationAdd | CommitOperationDelete] = []
    for path, action, _ in changes:
        if action == 'delete':
            operations.append(CommitOperationDelete(path, is_folder=False))
        elif action != 'keep':
            operations.append(CommitOperationAdd(path, files[path]))
    return api.create_commit(repo_id, operations, commit_message=message, parent_commit=parent).oid


def _find_tag(api: HfApi, repo_id: str, tag: str, info: ModelInfo | None, *, has_changes: bool) -> bool:
    """Return whether the tag is at the commit that the push will end at; one that is elsewhere is an error."""
    branches, tags = ['main'], {}
    if info is not None:
        with explain_hub_errors(repo_id):
            refs = api.list_repo_refs(repo_id)
        branches += [ref.name for ref in refs.branches]
        tags = {ref.name: ref.target_commit for ref in refs.tags}
    if tag in branches or _COMMIT.fullmatch(tag):
        raise MultiExitError(f"Tag '{tag}' would hide a branch or commit of '{repo_id}': choose another name.")
    if tag in tags and (has_changes or tags[tag] != info.sha):
        raise MultiExitError(
            f"Tag '{tag}' of '{repo_id}' is at commit {tags[tag]} already, and nothing was pushed: choose another name,"
            ' or delete it there.'
        )
    return tag in tags


def _plan(files: dict[str, Path], repo_id: str, info: ModelInfo | None) -> PushPlan:
    remote = {}
    for sibling in (info and info.siblings) or ():
        digest = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
        remote[sibling.rfilename] = RemoteFile(sibling.size or 0, digest, bool(sibling.lfs))
    with explain_hub_errors(repo_id):
        changes = compare(files, remote)
    return PushPlan(repo_id, endpoint(), info is not None, info and info.sha, changes)


def _read_remote(api: HfApi, repo_id: str, *, private: bool) -> ModelInfo | None:
    """Return commit, visibility and files of a repository's main branch in one answer, or None if it is not seen.

    Raises:
        MultiExitError: The Hub fails, or what is there must not be pushed to.
    """
    check_token(api.token, repo_id)
    with explain_hub_errors(repo_id):
        try:
            info = api.model_info(repo_id, files_metadata=True)
        except RepositoryNotFoundError as error:
            if isinstance(error, GatedRepoError) or is_token_refused(error):
                raise
            return None
    check_owned(repo_id, [sibling.rfilename for sibling in info.siblings or ()])
    if private and not info.private:
        raise MultiExitError(
            f"'{repo_id}' is public already, so it cannot be pushed to as private: make it private at"
            f' {endpoint()}/{repo_id}/settings, or choose another name.'
        )
    return info


def _api(token: str | None) -> HfApi:
    return HfApi(token=token, **_library())


def _library() -> dict[str, str]:
    """Return how this package introduces itself to the server."""
    return {'library_name': 'timm_multiexit', 'library_version': version('timm-multiexit')}
