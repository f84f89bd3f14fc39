"""What a request must be before anything of it is read: from this webui's own page or a program, and authorised.

A browser lets every page on the web send requests to a webui on the same computer. Their origin gives them away; a page
whose host name was pointed at this computer (DNS rebinding) is given away by that name.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import secrets
from collections.abc import Collection, Mapping
from urllib.parse import urlsplit

from ..core.errors import RequestError

__all__ = ["Credentials", "foreign_host", "foreign_origin"]

# nobody else can point names that end so at another computer
_LOCAL = (".localhost", ".local", ".lan", ".internal", ".home.arpa", ".gradio.live")


def foreign_origin(headers: Mapping[str, str], known: Collection[str] = ()) -> str | None:
    """Why a request that changes something is refused for the page that sent it; ``None``: it is not.

    Args:
        headers: The request's headers.
        known: Further origins or host names whose pages may send requests.
    """
    site = headers.get("sec-fetch-site", "")  # a page cannot set it
    if site in ("same-origin", "none"):
        return None
    origin = headers.get("origin")
    if origin is None and site == "":
        return None  # not from a browser
    try:
        netloc = urlsplit(origin or "").netloc.casefold()
    except ValueError:
        netloc = ""
    own = {headers.get("host", "").casefold(), headers.get("x-forwarded-host", "").casefold()} - {""}
    if netloc in own or {origin, "*", _name(netloc)} & set(known):
        return None
    return (
        f"This request comes from a page of another site ({(origin or 'unknown')[:80]}): only the webui's own pages "
        "and programs may send it. Where it is meant, start the webui with --cors-allow-origins, or name the host in "
        "the extension's settings."
    )


def foreign_host(headers: Mapping[str, str], known: Collection[str] = ()) -> str | None:
    """Why a request is refused for the host name that it was sent to; ``None``: it is not.

    Args:
        headers: The request's headers.
        known: Host names of this webui beside those of a local network.
    """
    name = _name(headers.get("host", ""))
    if not name or "." not in name.strip(".") or name.endswith(_LOCAL) or name in known:
        return None
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return (
            f"This request was sent to the host name '{name[:80]}', which this webui does not know as its own: use its "
            "address, name the host in the extension's settings, or start the webui with --api-auth."
        )
    return None


def _name(netloc: str) -> str:
    """The host name of an address, without user and port."""
    try:
        return (urlsplit(f"//{netloc}").hostname or "").casefold()
    except ValueError:
        return netloc.casefold()


class Credentials:
    """User names and passwords as in ``--api-auth``: ``user:password,user:password``.

    Raises:
        RequestError: One is malformed, or has no password.
    """

    def __init__(self, auth: str) -> None:
        self._known: list[tuple[bytes, bytes]] = []
        for entry in auth.split(","):
            user, _, password = entry.strip().partition(":")
            if not user or not password:
                # do not repeat the entry: it contains a password
                raise RequestError(
                    "--api-auth must have the form user:password, or several of them separated by commas, and no "
                    "password may be empty."
                )
            self._known.append((user.encode(), password.encode()))

    def fit(self, header: str) -> bool:
        """Whether an ``Authorization`` header has one of them; texts are UTF-8, or Latin-1 as old clients send."""
        scheme, _, given = header.partition(" ")
        if scheme.casefold() != "basic":
            return False
        try:
            plain = base64.b64decode(given.strip(), validate=True)
        except (binascii.Error, ValueError):
            return False
        spelt = {plain}
        try:
            plain.decode()
        except UnicodeDecodeError:
            spelt.add(plain.decode("latin-1").encode())
        fits = False
        for text in spelt:
            user, _, password = text.partition(b":")
            for known_user, known_password in self._known:
                # compare all of them in full, so that timing does not reveal a near match
                same_user = secrets.compare_digest(user, known_user)
                same_password = secrets.compare_digest(password, known_password)
                fits |= same_user and same_password
        return fits
