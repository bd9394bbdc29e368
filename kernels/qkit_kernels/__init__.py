"""Products with quantized weights: needs torch alone on the CPU, torch and Triton on a GPU."""
