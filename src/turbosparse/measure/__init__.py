"""Measurements of sparsity: NumPy for any source of activations, torch for Hugging Face models; reports."""

NUMBERS = "measurement.json"
PAGE = "report.html"
