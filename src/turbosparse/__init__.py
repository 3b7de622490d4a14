"""turbosparse: make a model's feed-forward layers sparse, measure the cost, run the result faster."""

__version__ = "0.1.0"
