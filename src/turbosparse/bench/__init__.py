"""Timing, roofline, baselines and result records."""
