"""When to stop: criteria and thresholds on logits, and budgets."""
