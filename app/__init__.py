"""How trained checkpoints are offered: an HTTP API, a durable store of items and a command line."""
