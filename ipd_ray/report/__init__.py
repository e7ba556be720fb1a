"""The one-page report of a run, of several side by side, or of a sweep: one HTML file that needs nothing else."""

from ipd_ray.report.page import build_report
from ipd_ray.report.sweep import build_sweep_report

__all__ = ["build_report", "build_sweep_report"]
