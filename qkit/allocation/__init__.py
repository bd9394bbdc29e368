"""From what decisions cost to a plan under a budget."""
