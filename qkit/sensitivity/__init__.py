"""What a decision costs: every unit of a model against every candidate format, by several measures."""
