"""What most training tests share: a tiny model, its data, and one process that forks ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from rank_server import RankServer, serve_ranks


@pytest.fixture(scope="session")
def server() -> Iterator[RankServer]:
    with serve_ranks() as serving:
        yield serving


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from training_runs import make_model  # not above: it skips where there is no torch

    return make_model(tmp_path_factory.mktemp("model"), dropout=True)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from training_runs import make_data

    return make_data(tmp_path_factory.mktemp("data"), 60, 10)
