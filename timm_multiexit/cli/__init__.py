"""The commands: flags become objects here, and nothing below knows of flags."""
