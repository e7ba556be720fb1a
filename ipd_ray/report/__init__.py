"""The one-page report of a run, or of several side by side: one HTML file that needs nothing else."""

from ipd_ray.report.page import build_report

__all__ = ["build_report"]
