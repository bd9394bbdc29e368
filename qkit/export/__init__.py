"""Exporters: from quantized tensors to the layout of a checkpoint format, and back."""
