"""The node's network interfaces: which of them the site means, which gloo is told, which way leads to the first node. No torch here.

NCCL takes prefixes, lists and exclusions (``ib,eth``, ``^docker,lo``, ``=ib0``), gloo whole names only, which a rank works out itself.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from launcher.errors import UsageError

_SIOCGIFADDR = 0x8915
"""Linux: the IPv4 address of an interface."""


def matching(expression: str, present: Sequence[str]) -> list[str]:
    """The interfaces of ``present`` that NCCL would take for ``NCCL_SOCKET_IFNAME=expression``, in the order of the expression.

    A list of prefixes; after ``=`` of whole names; after ``^`` all but these (and the loopback).
    """
    excluding = expression.startswith("^")
    rest = expression.lstrip("^")
    exact, words = rest.startswith("="), [word for word in rest.lstrip("=").split(",") if word]
    named = [[name for name in present if name == word or (not exact and name.startswith(word))] for word in words]
    listed = list(dict.fromkeys(name for names in named for name in names))
    return [name for name in present if name not in listed and name != "lo"] if excluding else listed


def interface_for(expression: str, site: str) -> str:
    """The one interface of this node that ``network.ifname`` means: the first that has an address.

    Errors: UsageError that lists the interfaces there are.
    """
    present = [name for _, name in socket.if_nameindex()]
    found = matching(expression, present)
    if not found:
        message = f"{node()} has no interface {expression}, but {', '.join(present)}"
        raise UsageError(message, code="no-interface", key="network.ifname", hint=f"network.ifname of site {site}")
    return next((name for name in found if address_of(name)), found[0])


def gloo_interface(network: Mapping[str, Any], site: str, nodes: int, environ: Mapping[str, str]) -> str | None:
    """What gloo is to be told; None where somebody has said it already, or nothing can be found out.

    The interface of ``network.ifname``; without one the loopback on a single node, else the interface that leads to the first node: left
    alone gloo takes what the host's name resolves to, which on many nodes is the loopback. Errors: UsageError.
    """
    if "GLOO_SOCKET_IFNAME" in network["env"]:
        return None
    if network["ifname"] is not None:
        return interface_for(network["ifname"], site)
    if "GLOO_SOCKET_IFNAME" in environ:
        return None
    if nodes == 1:
        return "lo"
    address = environ.get("MASTER_ADDR")
    way = None if address is None else way_to(address, int(environ.get("MASTER_PORT", "1")))
    return None if way is None else way[0]


def way_to(address: str, port: int) -> tuple[str, str] | None:
    """Interface and own address with which this node would send to ``address``; None where it does not know how. Sends nothing."""
    try:
        family, kind, number, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, number) as probe:
            probe.connect(place)
            own = str(probe.getsockname()[0])
    except OSError:
        return None
    name = next((name for _, name in socket.if_nameindex() if address_of(name) == own), None)
    if name is None and own.startswith("127."):
        name = "lo"
    return None if name is None else (name, own)


def address_of(interface: str) -> str | None:
    """Its first IPv4 address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            return None
    return socket.inet_ntoa(answer[20:24])


def node() -> str:
    """This node's name, as Slurm has it where it is known."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()
