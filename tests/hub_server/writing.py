"""Routes that write: repositories, uploads by LFS, commits, branches and tags."""

import base64
import fnmatch
import hashlib
import json
from typing import Any

import yaml

from hub_server.messages import Refusal, Request, Response, answer, route
from hub_server.reading import card_data
from hub_server.state import File, Repository, is_large


def validate_card(request: Request) -> Response:
    errors, warnings, card = [], [], {}
    try:
        card = card_data(request.json()['content'].encode())
    except yaml.YAMLError as error:
        errors.append(f'YAML parse error: {error}')
    if card is None:
        warnings.append('empty or missing yaml metadata in repo card')
        card = {}
    kinds = {'license': str, 'library_name': str, 'pipeline_tag': str, 'model-index': list}
    kinds |= dict.fromkeys(('tags', 'datasets', 'metrics', 'base_model'), (str, list))
    errors += [f'"{key}" is of a wrong type' for key in kinds if key in card and not isinstance(card[key], kinds[key])]
    result = {'errors': [{'message': line} for line in errors], 'warnings': [{'message': line} for line in warnings]}
    return answer(result, 400 if errors else 200)


def create_repository(request: Request) -> Response:
    hub, wanted = request.hub, request.json()
    request.authorize()
    owner = wanted.get('organization') or hub.user
    if owner not in (hub.user, *hub.orgs):
        raise Refusal(403, f"You don't have the rights to create a model under the namespace {owner}")
    if wanted.get('type', 'model') != 'model':
        raise Refusal(400, 'This Hub has models only')
    repo_id = f'{owner}/{wanted["name"]}'
    result = {'url': f'{hub.url}/{repo_id}', 'name': repo_id, 'id': '0' * 24}
    if repo_id in hub.repositories:
        message = 'You already created this model repo'
        return answer({**result, 'error': message}, 409, headers={'X-Error-Message': message})
    hub.create_repository(repo_id, is_private=wanted.get('visibility') == 'private' or bool(wanted.get('private')))
    return answer(result)


def delete_repository(request: Request) -> Response:
    wanted = request.json()
    request.authorize()
    repository = request.repository(f'{wanted.get("organization") or request.hub.user}/{wanted["name"]}')
    del request.hub.repositories[repository.repo_id]
    return answer({})


def preupload(request: Request, repo_id: str, revision: str) -> Response:
    """How each file is to be sent; the id of the file that is there lets the client leave out unchanged ones."""
    request.authorize()
    files, wanted = request.commit(repo_id, revision).files, request.json()
    lines = [line.strip() for line in (wanted.get('gitIgnore') or '').splitlines()]
    ignored = [line for line in lines if line and not line.startswith('#')]
    result = []
    for item in wanted['files']:
        path = item['path']
        mode = 'lfs' if is_large(path, item['size']) else 'regular'
        is_ignored = any(fnmatch.fnmatch(path, pattern) for pattern in ignored)
        entry = {'path': path, 'uploadMode': mode, 'shouldIgnore': is_ignored}
        result.append({**entry, **({'oid': files[path].etag} if path in files else {})})
    return answer({'files': result})


def lfs_batch(request: Request, repo_id: str) -> Response:
    """Where to send each LFS file; one that is already there has no actions."""
    hub, wanted = request.hub, request.json()
    request.repository(repo_id)
    request.authorize()
    objects = []
    for item in wanted['objects']:
        result = {'oid': item['oid'], 'size': item['size']}
        if not hub.has_large(item['oid']):
            url, size = f'{hub.url}/_lfs/{item["oid"]}', hub.multipart_bytes
            upload = {'href': url, 'header': {}}
            if size and item['size'] > size and 'multipart' in wanted['transfers']:
                parts = {str(number): f'{url}/{number}' for number in range(1, -(-item['size'] // size) + 1)}
                upload = {'href': f'{url}/complete', 'header': {'chunk_size': str(size), **parts}}
            result['actions'] = {'upload': upload, 'verify': {'href': f'{url}/verify', 'header': {}}}
        objects.append(result)
    return answer({'transfer': 'basic', 'objects': objects, 'hash_algo': 'sha256'})


def store_lfs(request: Request, sha256: str, content: bytes):
    if hashlib.sha256(content).hexdigest() != sha256:
        raise Refusal(400, 'sha256 mismatch')
    request.hub.lfs[sha256] = content


def lfs_put(request: Request, sha256: str, part: str | None = None) -> Response:
    if part is None:
        store_lfs(request, sha256, request.body)
    else:
        request.hub.parts[sha256, int(part)] = request.body
    return Response(200, headers={'ETag': f'"{hashlib.md5(request.body).hexdigest()}"'})


def lfs_complete(request: Request, sha256: str) -> Response:
    parts = request.json()['parts']
    store_lfs(request, sha256, b''.join(request.hub.parts.pop((sha256, part['partNumber'])) for part in parts))
    return answer({})


def lfs_verify(request: Request, sha256: str) -> Response:
    if len(request.hub.lfs.get(sha256, b'')) != request.json()['size']:
        raise Refusal(404, 'no such object')
    return answer({})


def apply_operation(request: Request, files: dict[str, File], key: str, value: dict[str, Any]):
    """Change the files as one line of a commit says.

    Raises:
        Refusal: the Hub would not take it.
    """
    path = value['path'].rstrip('/')
    if key == 'file':
        content = base64.b64decode(value['content'])
        if is_large(path, len(content)):
            raise Refusal(400, f'{path} must be uploaded as LFS')
        files[path] = File.regular(content)
    elif key == 'lfsFile':
        if not request.hub.has_large(value['oid']):
            raise Refusal(400, f'LFS pointer pointed to a file that does not exist: {path}')
        files[path] = File.large(value['oid'], len(request.hub.large_content(value['oid'])))
    elif key == 'deletedFile':
        if files.pop(path, None) is None:
            raise Refusal(404, "A file with this name doesn't exist", code='EntryNotFound')
    elif key == 'deletedFolder':
        for name in [name for name in files if name.startswith(f'{path}/')]:
            del files[name]
    else:
        raise Refusal(400, f'unknown operation: {key}')


def commit(request: Request, repo_id: str, revision: str) -> Response:
    repository = request.repository(repo_id)
    request.authorize()
    parent = request.commit(repo_id, revision)
    if revision not in repository.branches:
        raise Refusal(404, f'Invalid rev id: {revision}', code='RevisionNotFound')
    header, *operations = [json.loads(line) for line in request.body.splitlines() if line.strip()]
    header = header['value']
    if header.get('parentCommit') not in (None, parent.commit_id):
        raise Refusal(412, 'A commit has happened since. Please refresh and try again.')
    if not header.get('summary'):
        raise Refusal(400, 'Missing commit summary')
    files = dict(parent.files)
    for operation in operations:
        apply_operation(request, files, operation['key'], operation['value'])
    new = request.hub.commit(repository, revision, files, header['summary'], header.get('description', ''))
    url = f'{request.hub.url}/{repo_id}/commit/{new.commit_id}'
    return answer({'success': True, 'commitOid': new.commit_id, 'commitUrl': url, 'hookOutput': ''})


def set_name(names: dict[str, str], name: str, commit_id: str) -> Response:
    if name in names:
        raise Refusal(409, 'Reference already exists')
    names[name] = commit_id
    return answer({})


def create_branch(request: Request, repo_id: str, revision: str) -> Response:
    request.authorize()
    start = request.commit(repo_id, request.json().get('startingPoint') or 'main')
    return set_name(request.repository(repo_id).branches, revision, start.commit_id)


def create_tag(request: Request, repo_id: str, revision: str) -> Response:
    request.authorize()
    commit_id = request.commit(repo_id, revision).commit_id
    return set_name(request.repository(repo_id).tags, request.json()['tag'], commit_id)


def delete_tag(request: Request, repo_id: str, revision: str) -> Response:
    request.authorize()
    repository: Repository = request.repository(repo_id)
    if repository.tags.pop(revision, None) is None:
        raise Refusal(404, 'Tag not found', code='RevisionNotFound')
    return answer({})


ROUTES = (
    route('POST', '/api/validate-yaml', validate_card),
    route('POST', '/api/repos/create', create_repository),
    route('DELETE', '/api/repos/delete', delete_repository),
    route('POST', '/api/models/{id}/preupload/{revision}', preupload),
    route('POST', '/api/models/{id}/commit/{revision}', commit),
    route('POST', '/api/models/{id}/branch/{revision}', create_branch),
    route('POST', '/api/models/{id}/tag/{revision}', create_tag),
    route('DELETE', '/api/models/{id}/tag/{revision}', delete_tag),
    route('POST', r'/{id}\.git/info/lfs/objects/batch', lfs_batch),
    route('PUT', r'/_lfs/{sha256}(?:/(?P<part>\d+))?', lfs_put),
    route('POST', '/_lfs/{sha256}/complete', lfs_complete),
    route('POST', '/_lfs/{sha256}/verify', lfs_verify),
)
