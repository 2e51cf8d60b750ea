"""A Hub on this machine: enough of the Hugging Face Hub's HTTP API for the real client, in memory."""
