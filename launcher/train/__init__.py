"""The training that runs in the container, one process per rank: ``python -m launcher.train RUN_FOLDER``.

Nobody imports it, it is started. Read ``loop.py`` first.
"""
