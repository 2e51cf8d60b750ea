"""What the Hub on this machine holds: model repositories, their commits, and the bytes of their files."""

import fnmatch
import hashlib
import itertools
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

from hub_server.xet import Cas

DATE = '2026-01-01T00:00:00.000Z'
LARGE_BYTES = 10 * 2**20
LARGE_NAMES = ('*.safetensors', '*.bin', '*.pt', '*.pth', '*.onnx', '*.npz', '*.h5', '*.ckpt', '*.tar.*', '*.zip')


def is_large(path: str, size: int) -> bool:
    """Whether the Hub wants a file by LFS or Xet: by its name, or from 10 MB on; an empty file is never large."""
    name = path.rsplit('/', 1)[-1]
    return size >= LARGE_BYTES or (size > 0 and any(fnmatch.fnmatch(name, pattern) for pattern in LARGE_NAMES))


def git_blob_id(content: bytes) -> str:
    """The name git gives to a file's content."""
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


class File(NamedTuple):
    """One file of a commit. A regular one carries its bytes; a large one its sha256, under which they are stored."""

    size: int  # bytes
    blob_id: str  # git's, of the LFS pointer where the file is large
    content: bytes | None = None
    sha256: str | None = None
    pointer_size: int = 0

    @property
    def etag(self) -> str:
        return self.sha256 or self.blob_id

    @classmethod
    def regular(cls, content: bytes) -> 'File':
        return cls(len(content), git_blob_id(content), content)

    @classmethod
    def large(cls, sha256: str, size: int) -> 'File':
        pointer = f'version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n'.encode()
        return cls(size, git_blob_id(pointer), sha256=sha256, pointer_size=len(pointer))


class Commit(NamedTuple):
    """A commit: the whole tree, not a difference."""

    commit_id: str
    title: str
    message: str
    files: Mapping[str, File]
    parent: str | None


@dataclass
class Repository:
    """A model repository; branches and tags name commits."""

    repo_id: str
    is_private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def find(self, revision: str) -> Commit | None:
        """The commit that a branch, a tag, a full commit id or HEAD names."""
        revision = 'main' if revision == 'HEAD' else revision.removeprefix('refs/heads/')
        commit_id = self.branches.get(revision) or self.tags.get(revision.removeprefix('refs/tags/')) or revision
        return self.commits.get(commit_id)


class LogEntry(NamedTuple):
    """One answered request. `method` is LEAK for an access token that reached the CDN's host."""

    method: str
    path: str  # with the query
    status: int
    headers: dict[str, str]  # of the request, names in lower case
    size: int  # bytes of the request's body


class Hub:
    """All that one server holds.

    Attributes:
        url: the address of the Hub.
        cdn_url: another host name of the same server, so that the client sees large files behind a cross-host redirect.
        token: the only valid access token; `user` and `orgs` are the namespaces it may write to.
        log: every answered request, in order.
        fail_next: (regular expression of the path, status) of answers to spoil, each once; with status 0 the connection
            is closed without an answer.
        on_request: called with (method, path) before each request is answered, outside the lock: it may commit, or
            wait as long as it likes.
        multipart_bytes: larger LFS files are asked for in parts of this size.
        unreachable: makes a context in which the server refuses connections.
    """

    token = 'hf_test'
    user = 'tester'
    orgs = ('org', 'timm')

    def __init__(self):
        self.url = ''
        self.cdn_url = ''
        self.unreachable: Callable[[], AbstractContextManager] = nullcontext
        self.lock = threading.RLock()
        self._counter = itertools.count()
        self.clear()

    def clear(self):
        """Forget everything but the address."""
        self.repositories: dict[str, Repository] = {}
        self.lfs: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.xet = Cas()
        self.log: list[LogEntry] = []
        self.fail_next: list[tuple[str, int]] = []
        self.on_request: Callable[[str, str], None] | None = None
        self.multipart_bytes: int | None = None

    def create_repository(self, repo_id: str, *, is_private: bool = False) -> Repository:
        """Make a repository with a first commit, as the Hub does."""
        attributes = ''.join(f'{name} filter=lfs diff=lfs merge=lfs -text\n' for name in LARGE_NAMES)
        repository = self.repositories[repo_id] = Repository(repo_id, is_private)
        self.commit(repository, 'main', {'.gitattributes': File.regular(attributes.encode())}, 'initial commit')
        return repository

    def commit(self, repository: Repository, branch: str, files: dict, title: str, message: str = '') -> Commit:
        """Move a branch to a new commit of these files."""
        parent = repository.branches.get(branch)
        content = [repository.repo_id, parent, title, next(self._counter), sorted(files.items())]
        commit_id = hashlib.sha1(repr(content).encode()).hexdigest()
        commit = repository.commits[commit_id] = Commit(commit_id, title, message, files, parent)
        repository.branches[branch] = commit_id
        return commit

    def add(self, repo_id: str, contents: Mapping[str, bytes]) -> str:
        """Commit files past the HTTP API, keeping the others, and return the commit; a new repository is made."""
        with self.lock:
            repository = self.repositories.get(repo_id) or self.create_repository(repo_id)
            files = dict(repository.find('main').files)
            for path, content in contents.items():
                sha256 = hashlib.sha256(content).hexdigest()
                if is_large(path, len(content)):
                    self.lfs[sha256] = content
                    files[path] = File.large(sha256, len(content))
                else:
                    files[path] = File.regular(content)
            return self.commit(repository, 'main', files, 'added').commit_id

    def has_large(self, sha256: str) -> bool:
        return sha256 in self.lfs or sha256 in self.xet.file_of_sha256

    def large_content(self, sha256: str) -> bytes:
        """The bytes of a stored large file, wherever they were sent to."""
        return self.lfs[sha256] if sha256 in self.lfs else self.xet.content(self.xet.file_of_sha256[sha256])

    def content(self, file: File) -> bytes:
        return self.large_content(file.sha256) if file.content is None else file.content
