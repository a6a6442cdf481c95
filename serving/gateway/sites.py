"""Where a request comes from: the client's address, and whether a foreign web page sent it.

A browser sends what any page asks it to, also to a gateway on loopback that no other machine
reaches; and a page may give its own name the address 127.0.0.1 (DNS rebinding), to read answers,
too. So where no token is wanted, requests must name this gateway by a name of its own, and must
not come from another site.
"""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from regionspot.serving.gateway.errors import HttpError
from regionspot.serving.gateway.settings import LOOPBACK_HOSTS, GatewaySettings

_OWN_SITE = ("same-origin", "none")


class Sites:
    """The checks that a gateway's settings ask for."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._anonymous = settings.anonymous
        self._hosts: frozenset[str] | None = None
        if settings.allowed_hosts is not None:
            self._hosts = frozenset(name.lower() for name in settings.allowed_hosts)
        elif settings.anonymous and not settings.allow_anonymous:
            self._hosts = frozenset(LOOPBACK_HOSTS)

    def check_host(self, headers: Headers) -> None:
        """Raises HttpError FORBIDDEN for a name that is not this gateway's."""
        if self._hosts is not None and _name_of(headers.get("host", "")) not in self._hosts:
            raise HttpError(
                "FORBIDDEN",
                "this gateway does not go by the name in the header Host: start it with "
                "--allowed-host NAME, or use one of its names",
            )

    def check_site(self, headers: Headers) -> None:
        """Raises HttpError FORBIDDEN for a request that a page of another site sent, unless its
        token says who sent it.
        """
        if not self._anonymous:
            return
        site, origin = headers.get("sec-fetch-site"), headers.get("origin")
        foreign = site is not None and site not in _OWN_SITE
        if (
            origin is not None
            and urlsplit(origin).netloc.lower() != headers.get("host", "").lower()
        ):
            foreign = True
        if foreign:
            raise HttpError(
                "FORBIDDEN", "pages of other sites cannot ask a gateway that wants no token"
            )


class Proxies:
    """The addresses whose X-Forwarded-For is believed."""

    def __init__(self, networks: tuple[str, ...]) -> None:
        self._networks = [ip_network(network, strict=False) for network in networks]

    def trusts(self, address: str) -> bool:
        try:
            found = ip_address(address)
        except ValueError:
            return False
        mapped = getattr(found, "ipv4_mapped", None)
        return any((mapped or found) in network for network in self._networks)

    def client_of(self, peer: str, headers: Headers) -> str:
        """The address that a request comes from: the last one in X-Forwarded-For that is no trusted
        proxy's, if a trusted proxy sent the request.
        """
        client = peer
        hops = [hop.strip() for hop in ",".join(headers.getlist("x-forwarded-for")).split(",")]
        while self.trusts(client) and hops and _is_address(hops[-1]):
            client = hops.pop()
        return client


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address to listen on."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def _name_of(host: str) -> str:
    """A Host header without its port."""
    name, separator, port = host.lower().rpartition(":")
    return name if separator and port.isdecimal() else host.lower()
