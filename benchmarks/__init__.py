"""Where the figures in docs/ come from: workloads, a simulator, measurements, plots and the report."""
