"""One line for every way in which the Hugging Face Hub can fail, and for what must not even be asked of it."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    DisabledRepoError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    XetDownloadError,
)
from huggingface_hub.utils import validate_repo_id

from timm_multiexit.utils.errors import MultiExitError, one_line

_REVISION = re.compile(r'[A-Za-z0-9][A-Za-z0-9._+-]*(/[A-Za-z0-9][A-Za-z0-9._+-]*)*')

_TOKEN = re.compile(r'[!-~]+')

_FAILURES = (HTTPError, OSError, RuntimeError, ValueError, KeyError, XetDownloadError)

_LOG_IN = 'log in with `hf auth login`'

_NO_HUB = '{endpoint} does not answer as a Hub does: check HF_ENDPOINT and proxies'

# The first that fits holds.
_LINES: tuple[tuple[type[Exception], str], ...] = (
    (GatedRepoError, f"'{{repo_id}}' is gated: accept its terms at {{endpoint}}/{{repo_id}} and {_LOG_IN}"),
    (
        RepositoryNotFoundError,
        f"{{endpoint}} has no model repository '{{repo_id}}', or it is private: check the name, or {_LOG_IN}",
    ),
    (DisabledRepoError, "'{repo_id}' is disabled by {endpoint}: choose another repository"),
    (RevisionNotFoundError, "'{repo_id}' has no revision '{revision}': give one of its branches, tags or commits"),
    (RemoteEntryNotFoundError, "'{repo_id}' has no {file_name} at revision '{revision}': {hint}"),
    (OfflineModeIsEnabled, 'HF_HUB_OFFLINE is set, so that {endpoint} is not asked: unset it'),
    (FileMetadataError, _NO_HUB),
    (json.JSONDecodeError, _NO_HUB),
    (KeyError, _NO_HUB),
)

_STATUS_LINES = {
    400: "{endpoint} refuses what was sent for '{repo_id}': mend what it says",
    401: f'{{endpoint}} does not take the token: {_LOG_IN}, or mend HF_TOKEN, which goes first',
    403: "The token has no right to do this with '{repo_id}': use one that may write there",
    409: "'{repo_id}' has this already, made just now or hidden from this token: run again, or with another token",
    412: "'{repo_id}' has had another commit in the meantime, and nothing was changed: run again",
    429: '{endpoint} takes no more requests for now: run again later',
}


def endpoint() -> str:
    """Return the server's address without the user and password that it may have."""
    return re.sub(r'//[^/@]*@', '//', constants.ENDPOINT)


def check_repo_id(repo_id: str) -> None:
    """Raise `MultiExitError` unless a repository can have this name, with or without a namespace."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise MultiExitError(f'Repository {repo_id!r} is not of the form namespace/name: {_clean(error)}.') from error
    if not isinstance(repo_id, str) or not repo_id.isascii():
        raise MultiExitError(f'Repository {repo_id!r} is not of the form namespace/name: give one in ASCII.')


def check_revision(revision: str, kind: str = 'Revision') -> None:
    """Raise `MultiExitError` unless a branch, tag or commit can have this name, which the client makes a path of."""
    if not _REVISION.fullmatch(revision) or '..' in revision or len(revision) > 250:
        raise MultiExitError(
            f"{kind} {revision!r} is not taken: allowed are letters, digits, and '.', '_', '+', '-' or '/' after them."
        )


def check_token(token: str | None, repo_id: str, *, is_required: bool = False) -> None:
    """Raise `MultiExitError` where there is no token, or one of a wrong form: the client's refusal would show it.

    Args:
        token: None for the one that is logged in.
        repo_id: What it is for.
        is_required: Raise without a token as well.
    """
    with explain_hub_errors(repo_id):
        token = token or get_token()
    if token is None and is_required:
        raise MultiExitError(f"'{repo_id}' cannot be pushed to without a token: {_LOG_IN}.")
    if token is not None and not _TOKEN.fullmatch(token):
        raise MultiExitError(f'The token has spaces or signs that no token has: {_LOG_IN}, or mend HF_TOKEN.')


def is_token_refused(error: HfHubHTTPError) -> bool:
    """Return whether the server does not know the token; without one, 401 means that there may be such a thing."""
    return error.response.status_code == 401 and 'authorization' in error.response.request.headers


@contextmanager
def explain_hub_errors(
    repo_id: str, revision: str = 'main', file_name: str = 'file', *, before: str = ''
) -> Iterator[None]:
    """Turn what the client raises into one line.

    Args:
        repo_id: What was asked.
        revision: Of it.
        file_name: Of it.
        before: Goes in front of the line.

    Raises:
        MultiExitError: The line, from the client's error.
    """
    try:
        yield
    except MultiExitError:
        raise
    except _FAILURES as error:
        is_weight = file_name.endswith('.safetensors')
        hint = 'only safetensors are read' if is_weight else f'see {endpoint()}/{repo_id}/tree/main'
        facts = {'repo_id': repo_id, 'revision': revision, 'file_name': file_name, 'hint': hint}
        raise MultiExitError(f'{before}{_line(error).format(endpoint=endpoint(), **facts)}.') from error


def _line(error: Exception) -> str:
    """Return the line that explains an error, with the names of the facts about it in braces."""
    chain = [error]
    while len(chain) < 10 and (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    is_uncached = any(isinstance(each, LocalEntryNotFoundError) for each in chain)
    suffix = "; the cache has no {file_name} of '{repo_id}' at '{revision}'" if is_uncached else ''
    for each in chain:
        line = _known_line(each)
        if line is not None:
            return line + suffix
    return _escape(f'{endpoint()}: {_clean(error)}')


def _known_line(error: BaseException) -> str | None:
    """Return the line for an error of a known type, or None."""
    if isinstance(error, HfHubHTTPError) and is_token_refused(error):
        return _STATUS_LINES[401]
    for kind, line in _LINES:
        if isinstance(error, kind):
            return line
    if isinstance(error, HfHubHTTPError):
        return _status_line(error)
    if isinstance(error, HTTPError):
        return f'{{endpoint}} cannot be reached ({type(error).__name__}): check the network and HF_ENDPOINT'
    if isinstance(error, (ConnectionError, TimeoutError, XetDownloadError)):  # Xet, which moves large files
        return f'{{endpoint}} fails with a large file: run again later (it says: {_escape(_clean(error))})'
    if isinstance(error, OSError) and error.strerror:
        return _escape(f'{error.filename or "A file"} cannot be read or written: {error.strerror}')
    if isinstance(error, ValueError):  # the client's own words: which fields of a card are wrong, say
        return _escape(f'{endpoint()}: {_clean(error)}')
    return None


def _status_line(error: HfHubHTTPError) -> str:
    """Return the line for an answer that is an error, with what the server says."""
    status = error.response.status_code
    line = _STATUS_LINES.get(status, f'{{endpoint}} fails with status {status}: run again later')
    secret = error.response.request.headers.get('authorization', '').removeprefix('Bearer ')
    said = _clean(error.server_message or '', secret)
    return f'{line} (it says: {_escape(said)})' if said else line


def _clean(text: object, secret: str = '') -> str:
    """Return somebody's words on one line, shortened, without tokens, queries of addresses and control characters."""
    words = one_line(text, limit=None)
    if secret:
        words = words.replace(secret, '***')
    return re.sub(r'hf_\w+|(?<=\w)\?\S+', '***', words)[:300].rstrip('.')


def _escape(text: str) -> str:
    return text.replace('{', '{{').replace('}', '}}')
