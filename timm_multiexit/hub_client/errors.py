"""One line for every failure of the Hugging Face Hub, and checks of names and tokens before a request."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # httpx's or httpx2's
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    XetDownloadError,
)
from huggingface_hub.utils import validate_repo_id

from timm_multiexit.utils.errors import HubError, InvalidValueError, MultiExitError, one_line

_REVISION = re.compile(r'[A-Za-z0-9][A-Za-z0-9._+-]*(/[A-Za-z0-9][A-Za-z0-9._+-]*)*')
_TOKEN = re.compile(r'[!-~]+')
_FAILURES = (HTTPError, OSError, RuntimeError, ValueError, KeyError, XetDownloadError)
_LOG_IN = 'log in with `hf auth login`'

_HUB_LINES: dict[type[Exception], str] = {
    GatedRepoError: f"'{{repo_id}}' is gated: accept its terms at {{endpoint}}/{{repo_id}} and {_LOG_IN}",
    RepositoryNotFoundError: (
        f"{{endpoint}} has no model repository '{{repo_id}}', or it is private: check the name, or {_LOG_IN}"
    ),
    RevisionNotFoundError: "'{repo_id}' has no revision '{revision}': give one of its branches, tags or commits",
    RemoteEntryNotFoundError: (
        "'{repo_id}' has no {file_name} at revision '{revision}': see {endpoint}/{repo_id}/tree/main, only safetensors"
        ' are read as weights'
    ),
    OfflineModeIsEnabled: 'HF_HUB_OFFLINE is set, so {endpoint} was not contacted: unset it',
}

# What the client raises, and nothing else does.
CLIENT_ERRORS = (HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, XetDownloadError)

_UNCACHED = (
    "; the cache has no {file_name} of '{repo_id}' at '{revision}'. Without a network, run `hf download {repo_id}`"
    ' where there is one and copy its folder of HF_HUB_CACHE'
)


def endpoint() -> str:
    """Return the server's address without the user and password that it may have."""
    return re.sub(r'//[^/@]*@', '//', constants.ENDPOINT)


def check_repo_id(repo_id: str) -> None:
    """Raise `InvalidValueError` unless a repository can have this name, with or without a namespace."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InvalidValueError(f'Repository must have the form namespace/name, got {repo_id!r}.') from error
    if not isinstance(repo_id, str) or not repo_id.isascii():
        raise InvalidValueError(f'Repository must have the form namespace/name in ASCII, got {repo_id!r}.')


def check_revision(revision: str, kind: str = 'Revision') -> None:
    """Raise `InvalidValueError` unless a branch, tag or commit can have this name: the client makes a path of it."""
    if not _REVISION.fullmatch(revision) or '..' in revision or len(revision) > 250:
        raise InvalidValueError(
            f"{kind} must be made of letters, digits, '.', '_', '+', '-' and '/' and begin with a letter or digit,"
            f' got {revision!r}.'
        )


def check_token(token: str | None, repo_id: str, *, is_required: bool = False) -> None:
    """Raise `HubError` for a malformed token, or none where one is required; the client's own message would show it."""
    with explain_hub_errors(repo_id):
        token = token or get_token()
    if token is None and is_required:
        raise HubError(f"Pushing to '{repo_id}' requires a token: {_LOG_IN}.")
    if token is not None and not _TOKEN.fullmatch(token):
        raise HubError(f'The token contains spaces or invalid characters: {_LOG_IN}, or correct HF_TOKEN.')


def is_token_refused(error: HfHubHTTPError) -> bool:
    """Return whether the server rejects the token; without one, 401 means that the repository may be private."""
    return error.response.status_code == 401 and 'authorization' in error.response.request.headers


@contextmanager
def explain_hub_errors(
    repo_id: str,
    revision: str = 'main',
    file_name: str = 'file',
    *,
    before: str = '',
    kinds: tuple[type[Exception], ...] = _FAILURES,
) -> Iterator[None]:
    """Turn what the client raises into a `HubError` of one line, with the text `before` in front of it.

    `kinds` are the errors that are the client's; fewer than the default where other code runs too.
    """
    try:
        yield
    except MultiExitError:
        raise
    except kinds as error:
        facts = {'repo_id': repo_id, 'revision': revision, 'file_name': file_name, 'endpoint': endpoint()}
        raise HubError(f'{before}{_explain(error, facts)}.') from error


def _explain(error: Exception, facts: dict[str, str]) -> str:
    """Return the line that explains an error: ours for the common ones, else the client's words."""
    chain: list[BaseException] = [error]
    while len(chain) < 10 and (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    is_uncached = any(isinstance(each, LocalEntryNotFoundError) for each in chain)
    suffix = _UNCACHED.format(**facts) if is_uncached else ''
    for each in chain:
        if isinstance(each, HfHubHTTPError) and is_token_refused(each):
            return f'{endpoint()} rejected the token: {_LOG_IN}, or correct HF_TOKEN, which takes precedence'
        line = next((line for kind, line in _HUB_LINES.items() if isinstance(each, kind)), None)
        if line:
            return line.format(**facts) + suffix
    # That a file is not cached, or was not uploaded, says less than the server's answer behind it.
    reasons = [each for each in chain if not isinstance(each, LocalEntryNotFoundError)] or [error]
    is_said = isinstance(error, ValueError)  # about the files that were sent, in more words than the server's
    root = error if is_said else next((each for each in reasons if isinstance(each, HfHubHTTPError)), reasons[0])
    return f"{endpoint()} failed for '{facts['repo_id']}': {_describe(root)}{suffix}"


def _describe(error: BaseException) -> str:
    """Return the client's words in one line, shortened, without tokens, queries of addresses and passwords."""
    words = one_line(str(error), limit=None)
    if isinstance(error, HfHubHTTPError):
        said = one_line(error.server_message or '', limit=None)
        words = f'{error.response.status_code} {error.response.reason_phrase}{f" ({said})" if said else ""}'
        secret = error.response.request.headers.get('authorization', '').removeprefix('Bearer ')
        words = words.replace(secret, '***') if secret else words
    words = re.sub(r'hf_\w+|(?<=\w)\?\S+|(?<=//)[^/@\s]*@', '***', words)[:300].rstrip('.')
    return f'{type(error).__name__}: {words}' if words else type(error).__name__
