"""ftlaunch: from one YAML file to a fine-tuned code model on a Slurm cluster, in a container."""

__version__ = "0.1.0"
