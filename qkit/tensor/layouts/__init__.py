"""The layouts in which quantized weights are stored on disk, beside that of compressed-tensors: GPTQ, AWQ and ModelOpt.

Each is one file with the same four functions: why a weight cannot be stored so, the tensors that it takes, the tensors
themselves, and what config.json says. ``table`` lists them.
"""
