"""The report of a run as one HTML file that opens offline."""

from slimline.report.page import html, render

__all__ = ["html", "render"]
