"""Learned rounding of the weights of a block."""
