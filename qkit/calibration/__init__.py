"""Calibration rows, how a block is run on them, and the statistics that are gathered."""
