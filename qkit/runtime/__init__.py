"""A packed model that runs: loading, plugins of transformers and diffusers, generation."""
