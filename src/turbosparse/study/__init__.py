"""Studies: many measurements by one recipe, resumable, with a report."""

NUMBERS = "study.json"
