"""Diffusion transformers: pipelines, calibration along a trajectory, and policies of precision for each step."""
