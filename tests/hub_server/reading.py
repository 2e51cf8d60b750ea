"""Routes that read: account, repository, tree, files."""

import hashlib
import re
from collections.abc import Mapping
from urllib.parse import parse_qs, quote

import yaml  # a dependency of huggingface_hub

from hub_server.messages import TEXT, Refusal, Request, Response, answer, answer_bytes, route
from hub_server.state import DATE, Commit, File


def whoami(request: Request) -> Response:
    if not request.is_authorized:
        raise Refusal(401, 'Invalid credentials in Authorization header')
    orgs = [{'type': 'org', 'name': name, 'roleInOrg': 'admin'} for name in request.hub.orgs]
    token = {'type': 'access_token', 'accessToken': {'displayName': 'test', 'role': 'write'}}
    user = {'type': 'user', 'id': '0', 'name': request.hub.user, 'fullname': request.hub.user, 'isPro': False}
    return answer({**user, 'orgs': orgs, 'auth': token})


def card_data(readme: bytes) -> dict | None:
    """The YAML block at the head of a model card; None where there is none."""
    block = re.match(rb'\A---\s*\n(.*?)\n---\s*(\n|\Z)', readme, re.DOTALL)
    return yaml.safe_load(block[1]) if block else None


def tags_of(card: Mapping) -> list[str]:
    """The tags that the Hub makes of a card."""
    tags = list(card.get('tags') or [])
    tags += [card[key] for key in ('library_name', 'pipeline_tag') if card.get(key) and card[key] not in tags]
    for key, prefix in (('datasets', 'dataset'), ('license', 'license'), ('base_model', 'base_model')):
        values = card.get(key) or []
        tags += [f'{prefix}:{value}' for value in ([values] if isinstance(values, str) else values)]
    return tags


def list_siblings(commit: Commit, *, has_details: bool) -> list[dict]:
    siblings = []
    for path, file in sorted(commit.files.items()):
        sibling = {'rfilename': path}
        if has_details:
            sibling |= {'size': file.size, 'blobId': file.blob_id}
            if file.sha256:
                sibling['lfs'] = {'sha256': file.sha256, 'size': file.size, 'pointerSize': file.pointer_size}
        siblings.append(sibling)
    return siblings


def info(request: Request, repo_id: str, revision: str = 'main') -> Response:
    repository, commit = request.repository(repo_id), request.commit(repo_id, revision)
    readme = commit.files.get('README.md')
    card = (card_data(request.hub.content(readme)) if readme else None) or {}
    result = {'_id': '0' * 24, 'id': repo_id, 'modelId': repo_id, 'author': repo_id.split('/')[0]}
    result |= {'sha': commit.commit_id, 'lastModified': DATE, 'createdAt': DATE, 'private': repository.is_private}
    result |= {'gated': False, 'disabled': False, 'downloads': 0, 'likes': 0, 'spaces': [], 'tags': tags_of(card)}
    result['siblings'] = list_siblings(commit, has_details=request.option('blobs', 'false') in ('1', 'true'))
    if card:
        result['cardData'] = card
        result |= {key: card[key] for key in ('library_name', 'pipeline_tag', 'model-index') if card.get(key)}
    return answer(result)


def describe_file(request: Request, path: str, file: File) -> dict:
    item = {'type': 'file', 'oid': file.blob_id, 'size': file.size, 'path': path}
    if file.sha256:
        item['lfs'] = {'oid': file.sha256, 'size': file.size, 'pointerSize': file.pointer_size}
        if file.sha256 in request.hub.xet.file_of_sha256:
            item['xetHash'] = request.hub.xet.file_of_sha256[file.sha256]
    return item


def describe_folder(path: str) -> dict:
    return {'type': 'directory', 'oid': hashlib.sha1(path.encode()).hexdigest(), 'size': 0, 'path': path}


def tree(request: Request, repo_id: str, revision: str, path: str | None = None) -> Response:
    commit = request.commit(repo_id, revision)
    is_recursive = request.option('recursive', 'false') == 'true'
    prefix = f'{path.rstrip("/")}/' if path else ''
    items = {}
    for name, file in sorted(commit.files.items()):
        if name.startswith(prefix):
            parts = name[len(prefix) :].split('/')
            depth = len(parts) if is_recursive else 1
            folders = [prefix + '/'.join(parts[:idx]) for idx in range(1, len(parts)) if idx <= depth]
            items |= {folder: describe_folder(folder) for folder in folders if folder not in items}
            if len(parts) <= depth:
                items[name] = describe_file(request, name, file)
    if prefix and not items:
        raise Refusal(404, f'{path} does not exist on {revision}', code='EntryNotFound')
    first, limit = int(request.option('cursor', '0')), int(request.option('limit', '1000'))
    page, headers = list(items.values())[first : first + limit], {}
    if first + limit < len(items):
        query = f'recursive={str(is_recursive).lower()}&limit={limit}&cursor={first + limit}'
        headers['Link'] = f'<{request.hub.url}{request.path}?{query}>; rel="next"'
    return answer(page, headers=headers)


def paths_info(request: Request, repo_id: str, revision: str) -> Response:
    files = request.commit(repo_id, revision).files
    is_json = 'json' in request.headers.get('Content-Type', '')
    paths = request.json()['paths'] if is_json else parse_qs(request.body.decode()).get('paths', [])
    items = []
    for path in paths:
        if path in files:
            items.append(describe_file(request, path, files[path]))
        elif any(name.startswith(f'{path.rstrip("/")}/') for name in files):
            items.append(describe_folder(path))
    return answer(items)


def refs(request: Request, repo_id: str) -> Response:
    repository = request.repository(repo_id)
    kinds = (('branches', 'refs/heads/', repository.branches), ('tags', 'refs/tags/', repository.tags))
    result = {
        kind: [{'name': name, 'ref': prefix + name, 'targetCommit': commit} for name, commit in names.items()]
        for kind, prefix, names in kinds
    }
    return answer({**result, 'converts': [], 'pullRequests': []})


def commits(request: Request, repo_id: str, revision: str) -> Response:
    repository, commit = request.repository(repo_id), request.commit(repo_id, revision)
    result = []
    while commit:
        entry = {'id': commit.commit_id, 'title': commit.title, 'message': commit.message, 'date': DATE}
        result.append({**entry, 'authors': [{'user': request.hub.user}]})
        commit = repository.commits.get(commit.parent)
    return answer(result)


def resolve(request: Request, repo_id: str, revision: str, path: str) -> Response:
    """A file: large ones lie behind the CDN, regular ones behind a relative redirect to `resolve-cache`."""
    hub, commit = request.hub, request.commit(repo_id, revision)
    headers = {'X-Repo-Commit': commit.commit_id}  # the Hub sends it with 404 too
    file = commit.files.get(path)
    if file is None:
        raise Refusal(404, 'Entry not found', code='EntryNotFound', headers=headers)
    headers |= {'ETag': f'"{file.etag}"', 'Content-Disposition': f"inline; filename*=UTF-8''{quote(path)}"}
    if file.sha256 is None and '/resolve-cache/' in request.path:
        return answer_bytes(request, file.content, headers, TEXT)
    headers['X-Linked-Size'] = str(file.size)
    if file.sha256 is None:
        headers['Location'] = f'/api/resolve-cache/models/{repo_id}/{commit.commit_id}/{quote(path)}'
        return Response(307, b'Temporary Redirect', headers, TEXT)
    headers |= {'X-Linked-ETag': f'"{file.sha256}"', 'Location': f'{hub.cdn_url}/_cdn/{file.sha256}'}
    if file.sha256 in hub.xet.file_of_sha256:
        token_url = f'{hub.url}/api/models/{repo_id}/xet-read-token/{commit.commit_id}'
        headers |= {'X-Xet-Hash': hub.xet.file_of_sha256[file.sha256], 'Link': f'<{token_url}>; rel="xet-auth"'}
    return Response(302, b'Found', headers, TEXT)


def cdn(request: Request, sha256: str) -> Response:
    if not request.hub.has_large(sha256):
        raise Refusal(404, 'no such content')
    return answer_bytes(request, request.hub.large_content(sha256), {'ETag': f'"{sha256}"'})


ROUTES = (
    route('GET', '/api/whoami-v2', whoami),
    route('GET', '/api/models/{id}', info),
    route('GET', '/api/models/{id}/revision/{revision}', info),
    route('GET', '/api/models/{id}/tree/{revision}(?:/(?P<path>.*))?', tree),
    route('POST', '/api/models/{id}/paths-info/{revision}', paths_info),
    route('GET', '/api/models/{id}/refs', refs),
    route('GET', '/api/models/{id}/commits/{revision}', commits),
    route('GET', '/api/resolve-cache/models/{id}/{revision}/(?P<path>.+)', resolve),
    route('GET', '/{id}/resolve/{revision}/(?P<path>.+)', resolve),
    route('GET', '/_cdn/{sha256}', cdn),
)
