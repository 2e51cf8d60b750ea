"""Errors, files, text and the environment; nothing here knows of exits."""
