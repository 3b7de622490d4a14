"""The serving column: model files, the engine and what stands around it; never torch."""
