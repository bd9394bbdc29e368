"""The machine: cores, memory, workers, processes of their own, progress."""
