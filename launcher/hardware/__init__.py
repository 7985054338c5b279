"""What GPUs, drivers and software can do together, and what a run takes of disk. Data and formulas; no file is read here."""
