"""Activations, FFN modules and how each Hugging Face model type is wrapped (torch)."""
