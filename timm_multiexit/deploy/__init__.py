"""Programs for devices: exits in ONNX and torch.export form, and what runs them."""
