"""From a trained model, predictors and thresholds to a model file; the only room that sees both columns."""
