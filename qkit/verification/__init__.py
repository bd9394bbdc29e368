"""The independent proof of a packed checkpoint: it shares no code with the writer."""
