"""The user's own defaults: ``~/.config/ftlaunch/config.yaml``."""

from __future__ import annotations

from launcher.preset.fields import Frozen, Name
from launcher.preset.schema import Slurm


class UserConfig(Frozen):
    site: Name | None = None
    """The site when neither ``--site`` nor ``$FTLAUNCH_SITE`` names one."""
    slurm: Slurm = Slurm()
    """Account, partition, qos and so on, where neither the command line nor the preset says them."""
