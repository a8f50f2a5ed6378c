"""What a browser says of a request: the name by which it found this server, and the site of the page that asks.

A page of any site can make a browser on this machine send requests to loopback, even under a name that leads there
(DNS rebinding). It can set neither Host nor Origin nor Sec-Fetch-Site itself, and only content types that no form has
make the browser ask first.
"""

from __future__ import annotations

import re

from starlette.datastructures import Headers
from starlette.types import Scope

from .service import Refusal
from .settings import ANY_HOST, host_of

_FOR_PROBES = re.compile(r"/metrics|/v2/health/.*")
_LINKED = re.compile(r"/|/docs/?|/v1/samples/[0-9]+/[0-9]+\.png")  # where a link on another site's page may lead
_OF_FORMS = ("", "text/plain", "multipart/form-data", "application/x-www-form-urlencoded")


class Browsers:
    """Which requests are served, by what a browser says; ``allowed`` are the names of this server."""

    def __init__(self, allowed: tuple[str, ...]) -> None:
        self._any = ANY_HOST in allowed
        self._names = [name for name in map(host_of, allowed) if name]

    def refusal(self, scope: Scope) -> Refusal | None:
        """Why a request goes no further."""
        if _FOR_PROBES.fullmatch(scope["path"]):
            return None
        headers = Headers(scope=scope)
        host = host_of(headers.get("host", ""))
        if "host" in headers and not self._any and host not in self._names:  # no browser leaves it out
            expected = f"one of {', '.join(self._names)}, or what else this server is told that it is called"
            return Refusal(403, f"Host is '{headers.get('host', '')[:80]}'; expected {expected}")
        if _is_another_sites(headers, [*self._names, host]) and not _is_link(scope, headers):
            return Refusal(403, "a browser sent this for the page of another site, which may not ask")
        marked = "origin" in headers or "sec-fetch-site" in headers
        content_type = headers.get("content-type", "").split(";")[0].strip().lower()
        if scope["method"] == "POST" and marked and content_type in _OF_FORMS:
            return Refusal(415, f"the content type is '{content_type}', as forms have it; expected that of the body")
        return None


def _is_another_sites(headers: Headers, names: list[str | None]) -> bool:
    """Sec-Fetch-Site says it; where a browser does not send that, Origin is compared with this server's names."""
    if site := headers.getlist("sec-fetch-site"):
        return any(one not in ("same-origin", "same-site", "none") for one in site)
    origins = [origin.partition("://")[2] for origin in headers.getlist("origin")]  # "null" becomes ""
    return any(not origin or host_of(origin) not in names for origin in origins)


def _is_link(scope: Scope, headers: Headers) -> bool:
    """Whether somebody followed a link, to what may be linked."""
    followed = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
    return followed and scope["method"] == "GET" and bool(_LINKED.fullmatch(scope["path"]))
