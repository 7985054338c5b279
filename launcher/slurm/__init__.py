"""Slurm: the job that a supervisor lives in, what the queue says, and the submitit plugin."""
