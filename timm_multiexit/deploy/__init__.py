"""From a model to programs that run without PyTorch."""
