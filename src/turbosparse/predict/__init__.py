"""Predictors of active neurons: fit and score."""
