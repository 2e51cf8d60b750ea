"""The flags of the commands, timm's and those for exits, and which of them go together."""
