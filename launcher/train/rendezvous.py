"""Whether every node reaches the first one, tried before torch tries it: torch waits half an hour and then names no host.

One process of each node takes part. The first node listens on torch's own port and says at which address the site's interface has it;
the others connect to both. Standard library only; nothing of it is left when torch begins.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from launcher.errors import UsageError
from launcher.train.network import address_of, interface_for, node, way_to

CONNECT_S = 3.0
"""One attempt."""
LOST_S = 10.0
"""So long an address is tried that leads nowhere; one that refuses may just not listen yet, and gets all the time there is."""
AGAIN_S = 0.2
LATE_S = 5.0
"""The first node waits longer than the others, since they know better what is wrong."""


@dataclass(frozen=True)
class Meeting:
    """Where the nodes of a life meet."""

    address: str
    """MASTER_ADDR."""
    port: int
    names: Sequence[str]
    """The nodes as Slurm names them, the first one first."""
    site: str
    ifname: str | None
    """``network.ifname`` of the site."""
    host_suffix: str | None
    within_s: float

    @property
    def first(self) -> str:
        return self.names[0]


def meet(meeting: Meeting, number: int) -> None:
    """Come together, as node ``number`` of ``meeting.names``. Errors: UsageError that names the two hosts and what to set in the site."""
    if number == 0:
        _receive(meeting)
    else:
        _visit(meeting, number)


def _receive(meeting: Meeting) -> None:
    data = None if meeting.ifname is None else interface_for(meeting.ifname, meeting.site)
    answer = {"host": node(), "interface": data, "address": None if data is None else address_of(data)}
    arrived: set[int] = set()
    wanted = set(range(1, len(meeting.names)))
    with _listen(meeting.port) as listener:
        end = time.monotonic() + meeting.within_s + LATE_S
        _reached(meeting, (meeting.address, meeting.port), end, LOST_S + LATE_S, patient=False).close()  # torch's first rank calls itself
        while arrived < wanted and time.monotonic() < end:
            listener.settimeout(AGAIN_S)
            with suppress(socket.timeout):
                visitor, _ = listener.accept()
                threading.Thread(target=_greet, args=(visitor, answer, arrived.add), daemon=True).start()
    if arrived < wanted:
        missing = ", ".join(meeting.names[index] for index in sorted(wanted - arrived))
        message = f"{missing} did not reach {node()} at {meeting.address}:{meeting.port} within {meeting.within_s:g} s"
        raise UsageError(message, code="no-rendezvous", key="network", hint=_suffix_hint(meeting))


def _greet(visitor: socket.socket, answer: dict[str, Any], arrived: Callable[[int], None]) -> None:
    """Whoever else calls at this port is let go."""
    with visitor, suppress(OSError, ValueError, KeyError, TypeError):
        visitor.settimeout(2 * CONNECT_S + LOST_S)
        lines = visitor.makefile("rw", encoding="utf-8")
        number = int(json.loads(lines.readline(1000))["node"])
        lines.write(json.dumps(answer) + "\n")
        lines.flush()
        if lines.readline(1000) == "met\n":
            arrived(number)
        lines.readline(1000)  # the visitor closes first, so that the port is free at once


def _visit(meeting: Meeting, number: int) -> None:
    end = time.monotonic() + meeting.within_s
    with _reached(meeting, (meeting.address, meeting.port), end, LOST_S, patient=True) as way:
        lines = way.makefile("rw", encoding="utf-8")
        lines.write(json.dumps({"node": number, "host": node()}) + "\n")
        lines.flush()
        try:
            first = json.loads(lines.readline(1000))
            address, interface = first["address"], first["interface"]
        except (OSError, ValueError, KeyError, TypeError):
            message = f"{node()} reaches {meeting.address}:{meeting.port}, but what answers is not {meeting.first}'s first rank"
            raise UsageError(message, code="no-rendezvous", key="network.host_suffix", hint=_suffix_hint(meeting)) from None
        if address is not None:
            _reached(meeting, (address, meeting.port), end, LOST_S, patient=False, interface=str(interface)).close()
        lines.write("met\n")
        lines.flush()


def _reached(
    meeting: Meeting, place: tuple[str, int], end: float, lost_s: float, *, patient: bool, interface: str | None = None
) -> socket.socket:
    """A connection to the first node, at its address or at its ``interface``; ``patient`` with a port where nobody listens yet.

    Errors: UsageError.
    """
    lost_at = min(end, time.monotonic() + lost_s)
    while True:
        try:
            connection = socket.create_connection(place, timeout=CONNECT_S)
            connection.settimeout(CONNECT_S)
            return connection
        except OSError as error:
            may_come = patient and isinstance(error, ConnectionRefusedError)
            if time.monotonic() + AGAIN_S >= (end if may_come else lost_at):
                raise _apart(meeting, place, interface, error) from error
        time.sleep(AGAIN_S)


def _apart(meeting: Meeting, place: tuple[str, int], interface: str | None, error: OSError) -> UsageError:
    way = way_to(*place)
    by = f" from {way[0]} ({way[1]})" if way is not None else ""
    over = f" over {interface}" if interface is not None else ""
    why = "timed out" if isinstance(error, socket.timeout) else error.strerror or str(error)
    message = f"{node()} cannot reach {meeting.first}{over} at {place[0]}:{place[1]}{by}: {why}"
    if interface is not None:
        hint = f"network.ifname of site {meeting.site} is {meeting.ifname}: an interface that connects the nodes; a firewall there?"
        return UsageError(message, code="no-rendezvous", key="network.ifname", hint=hint)
    if isinstance(error, ConnectionRefusedError):
        hint = f"{meeting.first}'s first rank does not listen: see its log; or {_suffix_hint(meeting)}"
        return UsageError(message, code="no-rendezvous", key="network.host_suffix", hint=hint)
    return UsageError(message, code="no-rendezvous", key="network.host_suffix", hint=_suffix_hint(meeting))


def _suffix_hint(meeting: Meeting) -> str:
    is_now = "is not set" if meeting.host_suffix is None else f"is {meeting.host_suffix!r}"
    return f"network.host_suffix of site {meeting.site} {is_now}: it makes the name under which nodes reach each other; or a firewall"


def _listen(port: int) -> socket.socket:
    """On every address of this node. Errors: OSError when the port is taken: the next life has another."""
    if socket.has_dualstack_ipv6():
        with suppress(OSError):
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", port), backlog=1024)
