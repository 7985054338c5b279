"""What a run looks like afterwards: plots as PNG, numbers as rows. Reads the run folder only; matplotlib is loaded when a plot is drawn."""

from __future__ import annotations

from launcher.report.plots import plots
from launcher.report.summary import Summary, summary, table

__all__ = ["Summary", "plots", "summary", "table"]
