"""Measurements that are kept: each is one command that writes its values, with versions and hardware, to ``benchmarks/results``."""
