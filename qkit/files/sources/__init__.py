"""Sources that are quantized already: one file for each way of storing, and a view in which their tensors are plain ones."""
