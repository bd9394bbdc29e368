"""Recipe and model to one decision per linear, before any weight is read."""
