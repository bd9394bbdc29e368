"""How fast products and models are on this machine, and how far that is from what the machine could do."""
