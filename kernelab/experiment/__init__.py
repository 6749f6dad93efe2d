"""What every paper's run shares: command line, run folder, metrics, checkpoints, progress, figures, devices."""

from kernelab.experiment.paper import Paper

__all__ = ["Paper"]
