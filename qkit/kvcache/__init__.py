"""Quantized KV caches: what a cache keeps packed (store), where and at which width (policy), and the classes that
transformers' attention and ``generate`` work with (layer, cache)."""
