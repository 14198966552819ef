"""Metrics, figures, reports and evaluation."""
