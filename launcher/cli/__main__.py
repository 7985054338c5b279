"""``python -m launcher.cli`` is ``ftlaunch``."""

from launcher.cli import main

main()
