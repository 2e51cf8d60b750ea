"""The HTTP server of the Hub on this machine: it reads a request, finds its route, sends the answer and logs it."""

import contextlib
import re
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from urllib.parse import parse_qs, unquote, urlsplit

from hub_server import reading, writing, xet_routes
from hub_server.messages import Refusal, Request, Response
from hub_server.state import Hub, LogEntry

ROUTES = (*reading.ROUTES, *writing.ROUTES, *xet_routes.ROUTES)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = 'HTTP/1.1'
    server_version = 'loopback-hub/1'
    disable_nagle_algorithm = True  # head and body are two packets, which would wait 40 ms for each other
    hub: Hub

    def log_message(self, *args):
        """Nothing on stderr."""

    def read_body(self) -> bytes:
        if self.headers.get('Transfer-Encoding', '').lower() != 'chunked':
            return self.rfile.read(int(self.headers.get('Content-Length') or 0))
        body = bytearray()
        while size := int(self.rfile.readline().split(b';')[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return bytes(body)

    def do_request(self):
        path, body = urlsplit(self.path).path, self.read_body()
        if self.hub.on_request is not None:
            self.hub.on_request(self.command, path)
        with self.hub.lock:
            response = self.spoil(path) or self.respond(path, body)
            self.log(response, body)
        if response.status:
            self.send(response)
        else:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_request

    def spoil(self, path: str) -> Response | None:
        for idx, (pattern, status) in enumerate(self.hub.fail_next):
            if re.search(pattern, path):
                del self.hub.fail_next[idx]
                return Refusal(status, 'injected failure').response
        return None

    def respond(self, path: str, body: bytes) -> Response:
        method = 'GET' if self.command == 'HEAD' else self.command
        request = Request(self.hub, method, path, parse_qs(urlsplit(self.path).query), self.headers, body)
        try:
            for route in ROUTES:
                parts = route.pattern.fullmatch(path) if route.method == method else None
                if parts:
                    found = {name: unquote(part) for name, part in parts.groupdict().items() if part is not None}
                    return route.function(request, **found)
            raise Refusal(404, f'no such route: {method} {path}')
        except Refusal as refusal:
            return refusal.response

    def log(self, response: Response, body: bytes):
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.hub.log.append(LogEntry(self.command, self.path, response.status, headers, len(body)))
        is_at_cdn = f'http://{self.headers.get("Host")}' == self.hub.cdn_url
        if is_at_cdn and 'authorization' in headers:
            self.hub.log.append(LogEntry('LEAK', self.path, response.status, headers, len(body)))

    def send(self, response: Response):
        self.send_response(response.status)
        headers = {'Content-Type': response.content_type, 'Content-Length': str(len(response.body))}
        for name, value in {**headers, 'X-Request-Id': 'loopback', **response.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(response.body)


def share_port(unbound: socket.socket) -> None:
    """Let another socket of this user have the same port; the system gives such a port to nobody who asks for any."""
    unbound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)


class Server(ThreadingTCPServer):
    """Serves a Hub on a free port of 127.0.0.1 from a thread of its own, until closed or the process ends.

    Not `http.server.HTTPServer`, which looks up the name of the address when it starts.
    """

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, hub: Hub):
        self.hub = hub
        self.connections: set[socket.socket] = set()
        super().__init__(('127.0.0.1', 0), type('BoundHandler', (Handler,), {'hub': hub}))
        port = self.server_address[1]
        hub.url = f'http://127.0.0.1:{port}'
        # The host must differ: huggingface_hub 1.33 compares host names, 2.4 host names and ports.
        hub.cdn_url = f'http://localhost:{port}'
        hub.unreachable = self.unreachable
        self._start()

    def server_bind(self):
        share_port(self.socket)
        super().server_bind()

    def _start(self):
        self._thread = threading.Thread(target=self.serve_forever, args=(0.1,), name='loopback-hub', daemon=True)
        self._thread.start()

    def process_request(self, request, client_address):
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request, client_address):
        """A client that goes away in the middle is no error here; anything else is printed."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def close(self):
        """Stop, and close the open connections too: clients keep them for later."""
        self.shutdown()
        with contextlib.suppress(OSError):  # macOS knows it for connections alone
            self.socket.shutdown(socket.SHUT_RDWR)  # or it listens on where a process was forked meanwhile
        self.server_close()
        self._thread.join()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    @contextlib.contextmanager
    def unreachable(self):
        """Refuse all connections until the end of the block, as a Hub that is down or far away."""
        reserved = socket.socket(self.address_family, self.socket_type)
        share_port(reserved)
        reserved.bind(self.server_address)  # before it is given up, or another process may get the port; not listening
        from huggingface_hub import close_session  # which reads where the Hub is when it is imported

        self.close()
        close_session()  # a connection that the client has kept would be reset, which is another error
        self.socket = reserved
        try:
            yield
        finally:
            self.server_activate()
            self._start()
