"""Requests and answers of the Hub on this machine, and the ways to refuse."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from hub_server.state import Commit, Hub, Repository

JSON = 'application/json; charset=utf-8'
BINARY = 'application/octet-stream'
TEXT = 'text/plain; charset=utf-8'


class Response(NamedTuple):
    """An answer; for HEAD the body is left out and its length still told."""

    status: int
    body: bytes = b''
    headers: Mapping[str, str] = {}
    content_type: str = JSON


class Refusal(Exception):
    """An answer that ends a request early; the client turns the code in its header into its own exception."""

    def __init__(self, status: int, message: str, *, code: str | None = None, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        names = {'X-Error-Message': message} | ({'X-Error-Code': code} if code else {}) | dict(headers or {})
        self.response = answer({'error': message}, status, headers=names)


@dataclass
class Request:
    """A request as the routes see it; `headers` is case-insensitive, `query` has lists of values."""

    hub: Hub
    method: str
    path: str
    query: dict[str, list[str]]
    headers: Mapping[str, str]
    body: bytes = field(repr=False)

    @property
    def is_authorized(self) -> bool:
        return self.headers.get('Authorization') == f'Bearer {self.hub.token}'

    def json(self) -> Any:
        return json.loads(self.body or b'{}')

    def option(self, name: str, default: str) -> str:
        return self.query.get(name, [default])[0].lower()

    def authorize(self):
        """Raise the Hub's answer to a caller without a valid token."""
        if not self.is_authorized:
            raise Refusal(401, 'Invalid username or password.')

    def repository(self, repo_id: str) -> Repository:
        """The repository, where the caller may see it."""
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.is_private and not self.is_authorized):
            # The Hub tells an anonymous caller 401 and a known one 404, and neither which of the two cases it is.
            raise Refusal(404 if self.is_authorized else 401, 'Repository not found', code='RepoNotFound')
        return repository

    def commit(self, repo_id: str, revision: str) -> Commit:
        commit = self.repository(repo_id).find(revision)
        if commit is None:
            raise Refusal(404, f'Invalid rev id: {revision}', code='RevisionNotFound')
        return commit


class Route(NamedTuple):
    """A route: its function is called with the request and the named parts of the path."""

    method: str
    pattern: re.Pattern
    function: Callable[..., Response]


def route(method: str, template: str, function: Callable[..., Response]) -> Route:
    """Return a route; in the template {id} is a repository, {revision} one part of the path, {sha256} 64 digits."""
    pattern = template.replace('{id}', r'(?P<repo_id>[^/]+/[^/]+)').replace('{revision}', r'(?P<revision>[^/]+)')
    return Route(method, re.compile(pattern.replace('{sha256}', r'(?P<sha256>[0-9a-f]{64})')), function)


def answer(value: Any, status: int = 200, *, headers: Mapping[str, str] | None = None) -> Response:
    """Return a JSON answer."""
    return Response(status, json.dumps(value).encode(), headers or {})


def answer_bytes(request: Request, content: bytes, headers: Mapping[str, str], content_type: str = BINARY) -> Response:
    """Return a file, or the range of it that was asked for."""
    headers = {**headers, 'Accept-Ranges': 'bytes'}
    wanted = re.fullmatch(r'bytes=(\d+)-(\d*)', request.headers.get('Range', ''))
    if not wanted:
        return Response(200, content, headers, content_type)
    first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
    if first >= len(content):
        return Response(416, b'', {**headers, 'Content-Range': f'bytes */{len(content)}'})
    headers['Content-Range'] = f'bytes {first}-{last}/{len(content)}'
    return Response(206, content[first : last + 1], headers, content_type)
