"""Training text: sources, mixtures, packing (torch column)."""
