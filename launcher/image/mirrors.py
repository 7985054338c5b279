"""Where a build takes its packages from: what the site says, else what pip and apt of the building machine are configured with.

They reach the build as files in a folder that is bound to ``/mnt`` (``pip.conf``, ``apt.conf``, ``ca.crt``, local indexes and wheels),
so that no address, path or password of a site is in the image or its definition. The one exception is the Debian mirror, which
Apptainer itself records; with a password in it it is refused.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from launcher.errors import MissingError, UsageError
from launcher.preset.site import Mirrors

_PIP_KEYS = ("index-url", "extra-index-url", "find-links", "trusted-host", "proxy", "timeout", "default-timeout", "no-index")
_APT_KEYS = re.compile(r'^(Acquire::(?:https?::(?:Proxy|Timeout)[^ ]*|Check-Valid-Until|Check-Date|Retries)) "([^"]*)";$')


@dataclass(frozen=True)
class Sources:
    """All that a build needs to know about the site's mirrors."""

    pip: Mapping[str, str]
    """Option → value of a ``pip.conf``; several values stand one below the other."""
    apt: Mapping[str, str]
    ca_bundle: Path | None


def machine_sources(mirrors: Mirrors) -> Sources:
    """The site's word for each, else the machine's. Errors: UsageError when the site names a CA bundle that is not there."""
    pip = {} if mirrors.pip_index else dict(_pip_configuration())
    cert = pip.pop("cert", None)
    if mirrors.pip_index:
        pip["index-url"] = mirrors.pip_index
    if mirrors.pip_extra_indexes:
        pip["extra-index-url"] = "\n".join(mirrors.pip_extra_indexes)
    if mirrors.pip_find_links:
        pip["find-links"] = mirrors.pip_find_links
    bundle = mirrors.ca_bundle or cert or os.environ.get("SSL_CERT_FILE")
    if bundle and not Path(bundle).is_file():
        raise UsageError(f"the CA bundle {bundle} is not there", code="missing-file", key="mirrors.ca_bundle")
    return Sources({key: value for key, value in pip.items() if key in _PIP_KEYS}, _apt_configuration(), Path(bundle) if bundle else None)


def debian_mirror(mirrors: Mirrors, suite: str) -> str:
    """Address that debootstrap takes ``suite`` from.

    Errors: MissingError when neither site nor apt names one, UsageError when it holds a password.
    """
    found = mirrors.debian or _mirror_of_apt(suite)
    if not found:
        hint = "name one in mirrors.debian of the site, or use a docker base"
        raise MissingError(f"no Debian mirror for {suite} is known on this machine", code="debian-mirror", hint=hint)
    if "@" in urlsplit(found).netloc:
        raise UsageError("the Debian mirror holds a password, which the image would show", code="secret", key="mirrors.debian")
    return found


def write_sources(sources: Sources, folder: Path) -> list[str]:
    """Write the folder that is bound to ``/mnt``; the binds that go into it beside (local indexes and wheels).

    Beside ``folder`` it leaves a link to each source, since ``--bind`` cannot be given every path.
    """
    binds: list[str] = []

    def moved(value: str, name: str, *, with_parent: bool) -> str:
        """A local folder gets a place below ``/mnt``; everything else stays as it is."""
        address = urlsplit(value)
        path = Path(unquote(address.path) if address.scheme == "file" else value)
        if address.scheme not in ("", "file") or not path.is_absolute():
            return value
        source = path.parent if with_parent else path
        place = f"{name}-{len(binds)}"
        (folder / place).mkdir()
        (folder.parent / place).symlink_to(source.absolute())  # a name without spaces, commas and colons
        binds.append(f"{folder.parent / place}:/mnt/{place}:ro")
        return f"file:///mnt/{place}/{quote(path.name)}" if with_parent else f"/mnt/{place}"

    pip = dict(sources.pip)
    for key in ("index-url", "extra-index-url", "find-links"):
        if key in pip:  # a local index is bound with its parent, since its pages point to files beside it
            pip[key] = "\n".join(moved(value, key, with_parent=key != "find-links") for value in pip[key].split())
    apt = dict(sources.apt)
    if sources.ca_bundle:
        shutil.copyfile(sources.ca_bundle, folder / "ca.crt")
        pip["cert"] = "/mnt/ca.crt"
        apt["Acquire::https::CaInfo"] = "/mnt/ca.crt"
    lines = [f"{key} = {_indented(value)}\n" for key, value in pip.items()]
    (folder / "pip.conf").write_text("".join(["[global]\n", *lines]), encoding="utf-8")
    (folder / "apt.conf").write_text("".join(f'{key} "{value}";\n' for key, value in apt.items()), encoding="utf-8")
    return binds


def _indented(value: str) -> str:
    return "\n    ".join(value.split("\n"))


def _pip_configuration() -> dict[str, str]:
    """Option → value, as pip itself reads its files and PIP_* variables; empty without pip."""
    for command in ([sys.executable, "-m", "pip"], ["pip3"], ["pip"]):
        said = _output([*command, "config", "list"])
        if said is not None:
            break
    else:
        return {}
    found: dict[str, str] = {}
    for section in ("global", "install", ":env:"):  # as pip ranks them
        for key, value in re.findall(rf"^{re.escape(section)}\.([a-z-]+)=(.*)$", said, re.MULTILINE):
            text = ast.literal_eval(value)
            found[key] = text.strip() if isinstance(text, str) else str(text)
    return found


def _apt_configuration() -> dict[str, str]:
    """What of apt's configuration decides whether a mirror can be used: proxies, and checks of dates that a frozen mirror fails."""
    said = _output(["apt-config", "dump"]) or ""
    return {match[1]: match[2] for line in said.splitlines() if (match := _APT_KEYS.match(line))}


def _mirror_of_apt(suite: str) -> str | None:
    said = _output(["apt-get", "indextargets", "--format", "$(REPO_URI)", f"Codename: {suite}"]) or ""
    return next((line for line in said.splitlines() if line), None)


def _output(command: Sequence[str]) -> str | None:
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return run.stdout if run.returncode == 0 else None
