"""Quantized KV caches: packed tensors (store), their widths and places (policy), and the classes for transformers' attention
and ``generate`` (layer, cache)."""
