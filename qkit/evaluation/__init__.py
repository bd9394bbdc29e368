"""What a quantized model costs in quality: texts, task suites and the budgets that both must meet."""
