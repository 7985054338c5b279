"""``ftlaunch bench``: how fast a preset trains on this machine, over attention, checkpointing, micro batch, adapter and sequence length.

``grid`` says what is measured, ``work`` starts each cell in a process of its own, ``measure`` and ``rival`` are such processes,
``tables`` writes what was found. Not the run's own metrics: those are ``launcher.metrics``.
"""
