"""One process that forks ranks, for all tests that start several."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from rank_server import RankServer, serve_ranks


@pytest.fixture(scope="session")
def server() -> Iterator[RankServer]:
    with serve_ranks() as serving:
        yield serving
