"""Sparsity of arrays: definitions and searches that both columns share, NumPy only."""
