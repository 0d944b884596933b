"""Fetches pictures from hosts that whoever runs the server has listed. By default there are none.

An address is parsed once, by one strict pattern. Its host is resolved once, each of its addresses has to be a global
one, and the connection goes to one of these: a name that resolves differently a moment later changes nothing.
"""

import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from llava.serve.errors import ApiError
from llava.serve.limits import Limits

_SAFE = r"[\w.~!$&'()*+,;=:@/%-]"  # characters of paths
_URL = re.compile(
    rf"https://(?P<host>[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?)(?P<path>/{_SAFE}*(?:\?(?:{_SAFE}|\?)*)?)", re.ASCII
)
_CHUNK = 64 * 2**10  # bytes
_PUBLIC = ipaddress.ip_network("2000::/3")  # all of IPv6 that is routed between networks
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_NOT_PUBLIC = tuple(map(ipaddress.ip_network, ("2001::/23", "2001:db8::/32", "3fff::/20", "192.88.99.0/24")))


class MediaFetcher:
    """Fetches pictures over https. There are no redirects, no credentials, and no port but 443."""

    def __init__(
        self,
        hosts: Sequence[str],
        limits: Limits,
        *,
        port: int = 443,
        context: ssl.SSLContext | None = None,
        resolve: Callable[[str, int], Sequence[str]] | None = None,
    ):
        """context, resolve, port: for tests, which have neither a certificate nor an address that others trust."""
        self.hosts = frozenset(host.lower() for host in hosts)
        self._limits, self._port, self._resolve = limits, port, resolve or _addresses
        self._context = context or ssl.create_default_context()

    def fetch(self, url: str) -> bytes:
        """Returns the contents. Raises ApiError, which does not tell what is at an address that is not allowed."""
        parsed = _URL.fullmatch(url)
        if parsed is None or parsed["host"] not in self.hosts:
            raise _error("image_url: this server fetches only https addresses of hosts on its list; send a data URL")
        end = time.monotonic() + self._limits.fetch_s
        try:
            connection = _Connection(parsed["host"], self._pinned(parsed["host"]), self._port, self._context, end)
            timer = threading.Timer(self._limits.fetch_s, connection.abort)  # a head may come byte by byte
            timer.start()
            try:
                return self._read(connection, parsed["path"], end)
            finally:
                timer.cancel()
                connection.close()
        except (OSError, http.client.HTTPException, ValueError):
            raise _error("image_url: the picture cannot be fetched; send a data URL") from None

    def _pinned(self, host: str) -> str:
        """Returns an address of a host. Raises ApiError unless all of them are global."""
        addresses = self._resolve(host, self._port)
        if not addresses or not all(map(is_global, addresses)):
            raise _error("image_url: the picture cannot be fetched; send a data URL")
        return addresses[0]

    def _read(self, connection: "_Connection", path: str, end: float) -> bytes:
        connection.request("GET", path, headers={"Accept": "image/*", "User-Agent": "llava"})
        response = connection.getresponse()
        if response.status != 200:
            raise _error("image_url: the host did not answer with a picture (redirects are not followed)")
        contents = bytearray()
        while chunk := response.read1(_CHUNK):
            contents += chunk
            if len(contents) > self._limits.picture_bytes:
                message = f"a picture has more than {self._limits.picture_bytes} bytes; send a smaller one"
                raise ApiError(413, message, param="messages")
            connection.check_time(end)
        if time.monotonic() >= end:  # the timer ended the connection, not the host
            raise TimeoutError
        return bytes(contents)


class _Connection(http.client.HTTPSConnection):
    """A connection to a given address, with the certificate of a host."""

    def __init__(self, host: str, address: str, port: int, context: ssl.SSLContext, end: float):
        super().__init__(host, port, context=context)
        self._address, self._tls, self._end = address, context, end
        self._socket: ssl.SSLSocket | None = None

    def connect(self) -> None:
        """Connects to the pinned address."""
        plain = socket.create_connection((self._address, self.port), timeout=self._left(self._end))
        self.sock = self._socket = self._tls.wrap_socket(plain, server_hostname=self.host)
        self.check_time(self._end)

    def abort(self) -> None:
        """Ends the connection, from another thread."""
        if self._socket:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def check_time(self, end: float) -> None:
        """Lets the next operation take no more than what is left. Raises TimeoutError if nothing is."""
        assert self._socket
        self._socket.settimeout(self._left(end))  # `sock` is None if the response ends with the connection

    @staticmethod
    def _left(end: float) -> float:
        left = end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


def is_global(address: str) -> bool:
    """Returns whether an address is one of the public internet, also one that IPv6 wraps."""
    ip = ipaddress.ip_address(address.split("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        wrapped = ip.ipv4_mapped or ip.sixtofour
        if ip in _NAT64:
            wrapped = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if wrapped is not None:
            return is_global(str(wrapped))
        if ip not in _PUBLIC:
            return False
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in _NOT_PUBLIC)


def _addresses(host: str, port: int) -> list[str]:
    return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def _error(message: str) -> ApiError:
    return ApiError(400, message, param="messages", code="invalid_image_url")
