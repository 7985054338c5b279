"""Which files a package index has of a distribution, with their hashes, and which of them fit this platform."""

from __future__ import annotations

import json
import re
import ssl
import urllib.error
import urllib.request
from functools import cache
from html import unescape
from pathlib import Path
from urllib.parse import unquote, urlsplit

from packaging.tags import Tag, sys_tags
from packaging.utils import InvalidSdistFilename, InvalidWheelFilename, canonicalize_name, parse_sdist_filename, parse_wheel_filename
from packaging.version import InvalidVersion, Version

from launcher.errors import ActionError

_ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
_ANCHOR = re.compile(r'<a[^>]*\shref="([^"#]*)#sha256=([0-9a-f]{64})"', re.IGNORECASE)


def files_of_index(index: str, name: str) -> dict[str, str]:
    """File name → SHA-256, of what the index (simple API, JSON or HTML, also a local folder) has of ``name``; empty when it has none.

    Errors: ActionError when the index does not answer.
    """
    address = urlsplit(index)
    if address.scheme == "file":
        page = Path(unquote(address.path), name, "index.html")
        return _anchors(page.read_text(encoding="utf-8")) if page.is_file() else {}
    request = urllib.request.Request(f"{index.rstrip('/')}/{name}/", headers={"Accept": _ACCEPT})
    try:
        with urllib.request.urlopen(request, timeout=60, context=ssl.create_default_context()) as answer:
            body, kind = answer.read().decode("utf-8"), answer.headers.get_content_type()
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return {}
        raise ActionError(f"the package index answered {error.code} for {name}", code="index") from error
    except OSError as error:
        raise ActionError(f"the package index does not answer for {name}: {error}", code="index") from error
    if kind.endswith("json"):
        return {file["filename"]: file["hashes"]["sha256"] for file in json.loads(body)["files"] if "sha256" in file["hashes"]}
    return _anchors(body)


def fits_platform(file: str, name: str, version: str, *, wheel: bool) -> bool:
    """Whether ``file`` is a wheel of that version that this Python can install; with ``wheel`` False: its source distribution."""
    try:
        if wheel:
            found_name, found_version, _, tags = parse_wheel_filename(file)
            return found_name == canonicalize_name(name) and found_version == Version(version) and not tags.isdisjoint(_platform_tags())
        found_name, found_version = parse_sdist_filename(file)
        return found_name == canonicalize_name(name) and found_version == Version(version)
    except (InvalidWheelFilename, InvalidSdistFilename, InvalidVersion):
        return False


@cache
def _platform_tags() -> frozenset[Tag]:
    return frozenset(sys_tags())


def _anchors(page: str) -> dict[str, str]:
    return {unquote(unescape(address)).rpartition("/")[2]: sha256 for address, sha256 in _ANCHOR.findall(page)}
