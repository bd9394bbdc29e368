"""Diffusion transformers: their pipelines, calibration along a trajectory, and precision by step."""
