"""Nodes that meet before torch, and nodes that do not: real processes on real sockets, no torch."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from launcher.errors import UsageError
from launcher.node import free_port
from launcher.plan import Plan
from launcher.ranks import rank_environment
from launcher.train import network
from launcher.train.network import gloo_interface, interface_for, matching, way_to
from launcher.train.place import Place, prepare_environment
from tests.conftest import REPOSITORY
from tests.test_ranks import IN_JOB, RUN
from tests.toy import toy_plan

NODE = """
import json, sys
from launcher.errors import UsageError
from launcher.train import rendezvous
rendezvous.LOST_S, rendezvous.LATE_S, rendezvous.CONNECT_S = 1.0, 1.0, 0.5
try:
    rendezvous.meet(rendezvous.Meeting(**json.loads(sys.argv[1])), int(sys.argv[2]))
except UsageError as error:
    print(error)
    sys.exit(2)
"""

PRESENT = ["lo", "eth0", "eno1", "ib0", "ib1", "docker0", "hsn0"]


@pytest.fixture
def port() -> int:
    return free_port()


def start(number: int, port: int, **meeting: Any) -> subprocess.Popen[str]:
    """A node of a meeting at 127.0.0.1, patient for two seconds."""
    wanted = {"address": "127.0.0.1", "names": ["node1", "node2"], "site": "here", "ifname": None, "host_suffix": None, "within_s": 2}
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY), "SLURMD_NODENAME": f"node{number + 1}"}
    argv = [sys.executable, "-c", NODE, json.dumps({**wanted, "port": port, **meeting}), str(number)]
    return subprocess.Popen(argv, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ended(node: subprocess.Popen[str]) -> tuple[int, str]:
    said = node.communicate(timeout=60)[0].strip()
    return node.returncode, said


@pytest.mark.parametrize("ifname", [None, "lo"])
def test_three_nodes_meet_and_leave_the_port_free(port: int, ifname: str | None) -> None:
    names = ["node1", "node2", "node3"]
    nodes = [start(number, port, names=names, ifname=ifname, within_s=30) for number in (2, 1, 0)]
    assert [ended(node) for node in nodes] == [(0, "")] * 3
    with socket.socket() as after:  # without SO_REUSEADDR: nothing of the meeting is left
        after.bind(("", port))


def test_a_stranger_at_the_port_does_not_disturb(port: int) -> None:
    first = start(0, port, within_s=30)
    while True:
        try:
            stranger = socket.create_connection(("127.0.0.1", port), timeout=1)
            break
        except ConnectionRefusedError:
            assert first.poll() is None
    stranger.sendall(b"GET / HTTP/1.0\r\n\r\n")
    second = start(1, port, within_s=30)
    assert (ended(second), ended(first)) == ((0, ""), (0, ""))
    stranger.close()


@pytest.fixture
def deaf() -> Iterator[int]:
    """A port that drops what comes, as a firewall does: its queue is full and nobody takes from it."""
    with ExitStack() as open_sockets:
        listener = open_sockets.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):
            caller = open_sockets.enter_context(socket.socket())
            caller.setblocking(False)
            caller.connect_ex(listener.getsockname())
        yield int(listener.getsockname()[1])


def test_dropped_packets_name_both_hosts_the_way_and_the_key(deaf: int) -> None:
    code, said = ended(start(1, deaf, host_suffix="-ib"))
    assert code == 2
    assert said == (
        f"network.host_suffix: node2 cannot reach node1 at 127.0.0.1:{deaf} from lo (127.0.0.1): timed out (network.host_suffix of site "
        "here is '-ib': it makes the name under which nodes reach each other; or a firewall)"
    )


@pytest.mark.parametrize(
    ("address", "why"),
    [("255.255.255.255", "Network is unreachable"), ("node1-nonsense.invalid", "(Name or service|Temporary failure|No address)")],
    ids=["unreachable", "no-such-name"],
)
def test_no_way_to_the_first_host(port: int, address: str, why: str) -> None:
    nodes = [start(number, port, address=address) for number in (0, 1)]
    for number, (code, said) in enumerate(map(ended, nodes), 1):
        assert code == 2
        assert said.startswith(f"network.host_suffix: node{number} cannot reach node1 at {address}:{port}")
        assert re.search(why, said), said
        assert "network.host_suffix of site here is not set" in said


def test_a_first_rank_that_does_not_come_is_not_waited_for_long(port: int) -> None:
    code, said = ended(start(1, port))
    assert code == 2 and f"node2 cannot reach node1 at 127.0.0.1:{port} from lo (127.0.0.1): Connection refused" in said
    assert "node1's first rank does not listen: see its log" in said


def test_nodes_that_do_not_come_are_named(port: int) -> None:
    names = ["node1", "node2", "node3"]
    first, third = start(0, port, names=names, within_s=6), start(2, port, names=names, within_s=30)
    assert ended(third) == (0, "")
    code, said = ended(first)
    assert (code, said.split(" (")[0]) == (2, f"network: node2 did not reach node1 at 127.0.0.1:{port} within 6 s")


def test_an_interface_that_does_not_connect_the_nodes(port: int) -> None:
    """The first node's interface has an address that leads elsewhere, seen from the second."""
    with socket.socket() as first:
        first.bind(("127.0.0.1", port))
        first.listen()
        second = start(1, port, ifname="ib0")
        visitor, _ = first.accept()
        visitor.sendall(json.dumps({"host": "node1", "interface": "ib0", "address": "255.255.255.255"}).encode() + b"\n")
        code, said = ended(second)
        visitor.close()
    assert code == 2
    assert said.startswith(f"network.ifname: node2 cannot reach node1 over ib0 at 255.255.255.255:{port}: Network is unreachable")
    assert "network.ifname of site here is ib0" in said


def test_somebody_else_at_the_address(port: int) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        second = start(1, port)
        visitor, _ = other.accept()
        visitor.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
        code, said = ended(second)
        visitor.close()
    assert code == 2 and f"reaches 127.0.0.1:{port}, but what answers is not node1's first rank" in said


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ("ib0", ["ib0"]),
        ("ib", ["ib0", "ib1"]),
        ("hsn,ib1", ["hsn0", "ib1"]),
        ("=ib", []),
        ("=ib1,eth0", ["ib1", "eth0"]),
        ("^docker,ib", ["eth0", "eno1", "hsn0"]),
        ("^=eth0,eno1,docker0", ["ib0", "ib1", "hsn0"]),
        ("bond", []),
    ],
)
def test_interfaces_as_nccl_takes_them(expression: str, names: list[str]) -> None:
    assert matching(expression, PRESENT) == names


def test_the_first_interface_with_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "if_nameindex", lambda: list(enumerate(PRESENT, 1)))
    monkeypatch.setattr(network, "address_of", {"ib1": "10.1.0.1", "eth0": "10.0.0.1"}.get)
    assert interface_for("ib,eth", "here") == "ib1"
    with pytest.raises(UsageError, match="has no interface bond, but lo, eth0, eno1, ib0, ib1, docker0, hsn0") as error:
        interface_for("bond", "here")
    assert error.value.findings[0].key == "network.ifname"


def test_the_way_to_this_machine_is_the_loopback() -> None:
    assert way_to("127.0.0.1", 1) == ("lo", "127.0.0.1")
    assert way_to("node1-nonsense.invalid", 1) is None


def planned(nodes: int, **site: Any) -> Plan:
    return toy_plan(nodes=nodes, site={"scheduler": "slurm", "network": site})


@pytest.mark.parametrize(
    ("nodes", "site", "environ", "told"),
    [
        pytest.param(2, {"ifname": "^eth,ifb"}, {}, None, id="nothing-but-loopback"),
        pytest.param(2, {"ifname": "l"}, {"GLOO_SOCKET_IFNAME": "l"}, "lo", id="prefix"),
        pytest.param(2, {"env": {"GLOO_SOCKET_IFNAME": "mine"}}, {"GLOO_SOCKET_IFNAME": "mine"}, None, id="said-by-the-site"),
        pytest.param(1, {}, {}, "lo", id="one-node"),
        pytest.param(2, {}, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1234"}, "lo", id="way-to-the-first"),
        pytest.param(2, {}, {"GLOO_SOCKET_IFNAME": "mine", "MASTER_ADDR": "127.0.0.1"}, None, id="said-by-the-caller"),
        pytest.param(2, {}, {}, None, id="nobody-knows"),
    ],
)
def test_what_gloo_is_told(
    monkeypatch: pytest.MonkeyPatch, nodes: int, site: dict[str, Any], environ: dict[str, str], told: str | None
) -> None:
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0")])
    found = planned(nodes, **site).site["network"]
    if told is None and site.get("ifname"):
        with pytest.raises(UsageError, match="has no interface"):
            gloo_interface(found, "here", nodes, environ)
    else:
        assert gloo_interface(found, "here", nodes, environ) == told


def test_a_rank_gets_prefixes_for_nccl_and_a_name_for_gloo() -> None:
    plan = planned(2, ifname="l,ib", env={"NCCL_IB_HCA": "mlx5"}, host_suffix="-ib")
    environ = rank_environment(RUN, plan, IN_JOB)
    prepare_environment(environ, plan, Place(1, 4, 1))
    wanted = {"NCCL_SOCKET_IFNAME": "l,ib", "GLOO_SOCKET_IFNAME": "lo", "NCCL_IB_HCA": "mlx5"}
    assert wanted.items() <= environ.items()
