"""Routes of the Xet protocol; what the client tries first and is not here answers 404, and it falls back."""

import re
import time

from hub_server.messages import Refusal, Request, Response, answer, answer_bytes, route


def token(request: Request, repo_id: str, scope: str, revision: str) -> Response:
    """An access token for the store; one part of the client reads it from the body, the other from the headers."""
    request.repository(repo_id)
    if scope == 'write':
        request.authorize()
    url, name, expires = request.hub.url, f'xet_{scope}', int(time.time()) + 3600
    headers = {'X-Xet-Cas-Url': url, 'X-Xet-Access-Token': name, 'X-Xet-Token-Expiration': str(expires)}
    return answer({'casUrl': url, 'accessToken': name, 'exp': expires}, headers=headers)


def authorize(request: Request, scope: str):
    if request.headers.get('Authorization') != f'Bearer xet_{scope}':
        raise Refusal(403, f'no {scope} token')


def put_xorb(request: Request, sha256: str) -> Response:
    authorize(request, 'write')
    return answer({'was_inserted': request.hub.xet.add_xorb(sha256, request.body)})


def put_shard(request: Request) -> Response:
    authorize(request, 'write')
    if not request.hub.xet.add_shard(request.body):
        raise Refusal(400, 'unknown xorb')
    return answer({'result': 1})


def reconstruction(request: Request, sha256: str) -> Response:
    authorize(request, 'read')
    xet = request.hub.xet
    if sha256 not in xet.files:
        raise Refusal(404, 'unknown file')
    size = sum(segment[1] for segment in xet.files[sha256])
    wanted = re.fullmatch(r'bytes=(\d+)-(\d+)', request.headers.get('Range', ''))
    first, last = (int(wanted[1]), int(wanted[2])) if wanted else (0, size - 1)
    if first >= size:
        raise Refusal(416, 'range past the end')
    skipped, runs = xet.plan(sha256, first, last)
    terms = [{key: run[key] for key in ('hash', 'range', 'unpacked_length')} for run in runs]
    fetch = {}
    for run in runs:
        url = f'{request.hub.url}/_xorb/{run["hash"]}'
        fetch.setdefault(run['hash'], []).append({'range': run['range'], 'url': url, 'url_range': run['url_range']})
    return answer({'offset_into_first_range': skipped, 'terms': terms, 'fetch_info': fetch})


def get_xorb(request: Request, sha256: str) -> Response:
    if sha256 not in request.hub.xet.xorbs:
        raise Refusal(404, 'unknown xorb')
    return answer_bytes(request, request.hub.xet.xorbs[sha256], {})


ROUTES = (
    route('GET', '/api/models/{id}/xet-(?P<scope>read|write)-token/{revision}', token),
    route('POST', '/v1/xorbs/default/{sha256}', put_xorb),
    route('POST', '(?:/v1)?/shards', put_shard),
    route('GET', '/v1/reconstructions/{sha256}', reconstruction),
    route('GET', '/_xorb/{sha256}', get_xorb),
)
