"""Download of files of one commit from the Hugging Face Hub, and upload of a folder as one commit.

Token, server and cache are those of `huggingface_hub`: `hf auth login` or HF_TOKEN, HF_ENDPOINT, HF_HOME. Every failure
is a `HubError` of one line without a token in it, raised from the client's own.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import URLError

from huggingface_hub import (
    HfApi,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.hf_api import ModelInfo

from timm_multiexit.hub_client.errors import (
    CLIENT_ERRORS,
    check_repo_id,
    check_revision,
    check_token,
    endpoint,
    explain_hub_errors,
    is_token_refused,
)
from timm_multiexit.hub_client.files import OWNED_FILES, check_file_path, check_owned, compare, local_files
from timm_multiexit.utils.errors import HubError, InvalidValueError, one_line
from timm_multiexit.version import __version__

_CLIENT: dict[str, Any] = {'library_name': 'timm_multiexit', 'library_version': __version__}  # as the server is told
_NO_CONNECTION = ('ConnectError', 'ConnectTimeout')  # of httpx or httpx2
_COMMIT = re.compile(r'[0-9a-f]{40}')


class Snapshot(NamedTuple):
    """Files of one commit, in the cache.

    Attributes:
        folder: Where they are; must not be written to, since later calls return the same files.
        commit: The commit, 40 hex digits.
    """

    folder: Path
    commit: str


class PushPlan(NamedTuple):
    """What a push would do.

    `parent` is the commit that it would follow, None without a repository; `actions` are path -> 'add', 'update',
    'delete' or 'keep', without files of others in the repository.
    """

    repo_id: str
    url: str
    parent: str | None
    actions: dict[str, str]


class PushResult(NamedTuple):
    """What a push did.

    Attributes:
        repo_id: namespace/name.
        commit: The commit that holds the folder, 40 hex digits.
        url: Page of the repository at this commit.
        has_changed: False if the repository already held the folder.
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
    cache_dir: str | os.PathLike[str] | None = None,
) -> Snapshot:
    """Return files of a model repository as one commit has them, from the cache where it holds them.

    The first file resolves a branch or tag to a commit, the others are taken from that commit. Offline or when the
    server fails, a branch stands for the commit that it was last resolved to.

    Args:
        repo_id: namespace/name.
        file_names: Paths in the repository, with slashes.
        revision: Branch, tag or commit; None for main.
        cache_dir: The cache's folder; None for the client's own.

    Raises:
        InvalidValueError: Malformed name or revision, or a format that can contain code (pickles).
        HubError: No such repository, revision or file, no access, or neither the server nor the cache has it.

    >>> fetch_files('org/name', ['model.bin'])
    Traceback (most recent call last):
        ...
    timm_multiexit.utils.errors.InvalidValueError: 'model.bin' has a format that can contain code: use safetensors.
    """
    check_repo_id(repo_id)
    if revision is not None:
        check_revision(revision)
    for name in file_names:
        check_file_path(name)
    if not file_names:
        raise InvalidValueError('file_names must have at least one name, got none.')
    check_token(None, repo_id)
    cache = None if cache_dir is None else Path(cache_dir)
    commit: str | None = None
    for name in file_names:
        with explain_hub_errors(repo_id, revision or 'main', name):
            folder = _fetch_file(repo_id, name, commit or revision, cache).parents[name.count('/')]
        if not _COMMIT.fullmatch(folder.name) or folder.name != (commit or folder.name):
            raise HubError(f"{endpoint()} returned no commit for {name} of '{repo_id}': check HF_ENDPOINT.")
        commit = folder.name
    return Snapshot(folder, folder.name)


def _fetch_file(repo_id: str, name: str, revision: str | None, cache_dir: Path | None) -> Path:
    if try_to_load_from_cache(repo_id, name, cache_dir=cache_dir, revision=revision) is None:
        _check_connection(repo_id, name, revision)
    try:
        return Path(hf_hub_download(repo_id, name, revision=revision, cache_dir=cache_dir, **_CLIENT))
    except HTTPError as error:
        # The client falls back to its cache where no connection can be made, but not where one breaks.
        cached = try_to_load_from_cache(repo_id, name, cache_dir=cache_dir, revision=revision)
        if isinstance(error, HfHubHTTPError) or not isinstance(cached, str):
            raise
        return Path(cached)


def _check_connection(repo_id: str, name: str, revision: str | None = None) -> None:
    """Raise what the client raises where no connection can be made: it would try for half a minute first."""
    try:
        url = hf_hub_url(repo_id, name, revision=revision)
        get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT, **_CLIENT)
    except (HTTPError, OSError) as error:
        # All else, as answers and what may pass, is left to the download itself.
        if isinstance(error, OfflineModeIsEnabled) or type(error).__name__ in _NO_CONNECTION:
            raise LocalEntryNotFoundError(str(error)) from error


@contextmanager
def explain_download(
    repo_id: str | None, file_name: str, *, cache_dir: str | os.PathLike[str] | None = None
) -> Iterator[None]:
    """Turn what fails while another library downloads weights into a `HubError` of one line.

    Where nothing of the repository is in the cache and no connection can be made, this is said at once.

    Args:
        repo_id: namespace/name of the weights, perhaps with @revision; None if they are elsewhere.
        file_name: The file of the weights.
        cache_dir: See `fetch_files`.

    Raises:
        HubError: The weights cannot be downloaded.
    """
    name, _, revision = (repo_id or '').partition('@')
    with explain_hub_errors(name, revision or 'main', file_name, kinds=CLIENT_ERRORS):
        if name:
            folder = Path(cache_dir or constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type='model'))
            if not any(folder.glob('snapshots/*/*')):
                _check_connection(name, file_name, revision or None)
        try:
            yield
        except URLError as error:
            raise HubError(f'Cannot download the weights: {one_line(error)}. See timm.list_pretrained().') from error


def check_push(repo_id: str, *, token: str | None = None, private: bool = False) -> str:
    """Return namespace/name of a repository that may be pushed to; changes nothing.

    Only the server knows the rights of a fine-grained token: without them `push_folder` fails.

    Args:
        repo_id: namespace/name, or a name in the namespace of the logged-in user.
        token: None for the one that is logged in.
        private: Whether a private repository is wanted.

    Raises:
        InvalidValueError: Malformed name.
        HubError: Not logged in, a token that the server rejects or that is read-only, a namespace without write access,
            a repository that holds something else than a publication, or a public one with `private`.
    """
    check_repo_id(repo_id)
    check_token(token, repo_id, is_required=True)
    with explain_hub_errors(repo_id):
        answer = _api(token).whoami()
        user, auth = answer['name'], (answer.get('auth') or {}).get('accessToken') or {}
        writable = [org['name'] for org in answer.get('orgs') or () if org.get('roleInOrg') != 'read']
    if auth.get('role') == 'read':
        raise HubError(
            f"The token of '{user}' is read-only: create one with write access at {endpoint()}/settings/tokens."
        )
    namespace, _, name = repo_id.rpartition('/')
    if namespace not in ('', user, *writable):
        names = ', '.join(f"'{each}'" for each in [user, *sorted(writable)[:10]])
        raise HubError(f"Namespace must be one that '{user}' may write to ({names}), got '{namespace}'.")
    repo_id = f'{namespace or user}/{name}'
    _read_remote(token, repo_id, private=private)
    return repo_id


def full_name(repo_id: str, *, token: str | None = None) -> str:
    """Return namespace/name; a bare name gets the namespace of the logged-in user from the server."""
    check_repo_id(repo_id)
    if '/' in repo_id:
        return repo_id
    try:
        check_token(token, repo_id, is_required=True)
        with explain_hub_errors(repo_id):
            return f'{_api(token).whoami()["name"]}/{repo_id}'
    except HubError as error:
        raise HubError(f"'{repo_id}' has no namespace: give namespace/name. {error}") from error


def plan_push(
    folder: str | os.PathLike[str], repo_id: str, *, token: str | None = None, private: bool = False
) -> PushPlan:
    """Return what `push_folder` would do with a folder; changes nothing.

    All files of the publication are pushed, those of its subfolders included, except hidden ones. A private repository
    is not visible without a token.

    Raises:
        MultiExitError: See `files.local_files`.
        HubError: The repository holds something else than a publication, or is public with `private`; the server
            cannot be reached or rejects the token.
    """
    files = local_files(Path(folder))
    repo_id = full_name(repo_id, token=token)
    return _plan(files, repo_id, _read_remote(token, repo_id, private=private))


def push_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    tag: str | None = None,
    message: str = 'Publish with timm_multiexit',
    token: str | None = None,
) -> PushResult:
    """Make a repository hold a folder, by one commit, or none if nothing has changed.

    Only changed files are sent. Files that are missing in the folder are deleted in the repository if a publication
    writes them (`files.OWNED_FILES`); all others stay. The commit is the last step before the tag: until then the
    repository stays as it was, and an interrupted push can be run again.

    Args:
        folder: See `plan_push`.
        repo_id: See `check_push`; the repository is created if it does not exist.
        private: Create a private repository. An existing one stays as it is.
        tag: Tag of the commit; one that this commit already has is fine.
        message: Title of the commit.
        token: None for the one that is logged in.

    Raises:
        MultiExitError: See `files.local_files`.
        HubError: See `plan_push`; a tag that is at another commit, or the name of a branch; someone else's commit
            in between; no right to write.
    """
    if tag is not None:
        check_revision(tag, 'Tag')
    check_token(token, repo_id, is_required=True)
    files = local_files(Path(folder))
    repo_id = full_name(repo_id, token=token)
    api = _api(token)
    info = _read_remote(token, repo_id, private=private)
    has_changes = set(_plan(files, repo_id, info).actions.values()) != {'keep'}
    has_tag = tag is not None and _find_tag(api, repo_id, tag, info, has_changes=has_changes)
    with explain_hub_errors(repo_id):
        if info is None:
            # None leaves it to the organization; some allow only private repositories.
            api.create_repo(repo_id, private=private or None)
            info = api.model_info(repo_id)
            if private and not info.private:
                raise HubError(f"{endpoint()} made '{repo_id}' public, so nothing was pushed: delete it.")
        commit = parent = str(info.sha)
        if has_changes:
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=Path(folder),
                commit_message=message,
                parent_commit=parent,
                allow_patterns=list(files),  # checked names, without any signs of patterns
                delete_patterns=list(OWNED_FILES),
            ).oid
    if tag is not None and not has_tag:
        with explain_hub_errors(repo_id, before=f'Commit {commit} was pushed, but not tagged. '):
            api.create_tag(repo_id, tag=tag, revision=commit)
    return PushResult(repo_id, commit, f'{endpoint()}/{repo_id}/tree/{commit}', commit != parent)


def _find_tag(api: HfApi, repo_id: str, tag: str, info: ModelInfo | None, *, has_changes: bool) -> bool:
    """Return whether the commit that the push will end at has the tag already; anywhere else it is an error."""
    branches, tags = ['main'], {}
    if info is not None:
        with explain_hub_errors(repo_id):
            refs = api.list_repo_refs(repo_id)
        branches += [ref.name for ref in refs.branches]
        tags = {ref.name: ref.target_commit for ref in refs.tags}
    if tag in branches or _COMMIT.fullmatch(tag):
        raise InvalidValueError(f"Tag '{tag}' is the name of a branch or commit of '{repo_id}': choose another name.")
    if tag in tags and (has_changes or info is None or tags[tag] != info.sha):
        raise HubError(
            f"Tag '{tag}' of '{repo_id}' is already at commit {tags[tag]}, so nothing was pushed: choose another name,"
            ' or delete it there.'
        )
    return tag in tags


def _plan(files: dict[str, Path], repo_id: str, info: ModelInfo | None) -> PushPlan:
    remote = {
        sibling.rfilename: sibling.lfs.sha256 if sibling.lfs else str(sibling.blob_id)
        for sibling in (info.siblings if info else None) or ()
    }
    with explain_hub_errors(repo_id):
        return PushPlan(repo_id, f'{endpoint()}/{repo_id}', info.sha if info else None, compare(files, remote))


def _read_remote(token: str | None, repo_id: str, *, private: bool) -> ModelInfo | None:
    """Return commit, visibility and files of a repository's main branch, or None if it is not visible.

    A repository that must not be pushed to is a `HubError`.
    """
    check_token(token, repo_id)
    with explain_hub_errors(repo_id):
        try:
            info = _api(token).model_info(repo_id, files_metadata=True)
        except RepositoryNotFoundError as error:
            if isinstance(error, GatedRepoError) or is_token_refused(error):
                raise
            return None
    check_owned(repo_id, [sibling.rfilename for sibling in info.siblings or ()])
    if private and not info.private:
        raise HubError(
            f"'{repo_id}' already exists and is public: make it private at {endpoint()}/{repo_id}/settings, or choose"
            ' another name.'
        )
    return info


def _api(token: str | None) -> HfApi:
    return HfApi(token=token, **_CLIENT)
