"""Starts one process in the image that its node unpacked: ``python -m launcher.image.rank JOB LIFE SHARED -- COMMAND``. Standard library.

It finds what ``launcher.image.unpack`` left for this node, puts it in the place of ``IMAGE`` and becomes the container's command by
``exec``: same process id, so that every signal reaches the container and nothing is left to pass it on. Python 3.9, on the host.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from launcher.image.enter import clean_environment, enter
from launcher.image.unpack import find, link, node_name
from launcher.plan import Container

IMAGE = "@image@"
"""Stands in a command for the image, until the node is known."""


def rank_command(
    python: str,
    container: Container,
    argv: Sequence[str],
    *,
    job: str,
    life: int,
    shared: str,
    binds: Sequence[str] = (),
    env: Mapping[str, str] = {},
    gpus: bool = False,
    cwd: str | None = None,
) -> list[str]:
    """The command of every rank, the same on all nodes: give it to ``srun``, or to Popen once for each rank on one machine.

    ``python`` is the host's interpreter; the process needs ``<run>/code`` on PYTHONPATH, which only this wrapper sees: what the rank
    needs on its path goes into ``env``. Variables that differ from rank to rank (RANK, LOCAL_RANK, CUDA_VISIBLE_DEVICES) are set in the
    process's environment and kept by ``clean_environment``. ``job``, ``life`` and ``shared`` are those of the ``unpack`` step, the rest is
    ``enter``'s.
    """
    return [
        python,
        "-m",
        "launcher.image.rank",
        job,
        str(life),
        shared,
        "--",
        *enter(container, IMAGE, argv, binds=binds, env=env, gpus=gpus, cwd=cwd),
    ]


def main(arguments: Sequence[str]) -> int:
    """Does not return where the image is there; 4 where this node has none."""
    job, life, shared, separator, *command = arguments
    assert separator == "--"
    node = node_name(os.environ)
    place = find(job, int(life), node, Path(shared))
    if place is None:
        missing = link(job, int(life), node)
        sys.stderr.write(f"{missing} is missing: the image of job {job}, life {life} was not unpacked on this node\n")
        return 4
    image = os.path.realpath(place)
    os.execvpe(command[0], [image if word == IMAGE else word for word in command], clean_environment(os.environ))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
