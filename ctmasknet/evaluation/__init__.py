"""How good the models are: `metrics` (each once), `rows` (what one slice gives), `evaluate` (a model on a data set)."""
