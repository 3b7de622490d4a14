"""What sparsity does to a model: losses on held-out text (torch column)."""
