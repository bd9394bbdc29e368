"""The loop over the blocks of a model, and the stages of one run."""
