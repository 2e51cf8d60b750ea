"""The Hugging Face Hub: the only code of the package that uses the network."""
