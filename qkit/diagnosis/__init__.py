"""The diagnosis of a quantized file of any writer: what is in it, and what is wrong with it."""
