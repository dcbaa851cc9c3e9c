"""How trained checkpoints are offered: an HTTP API, a durable store of items and a command line."""

import os

# OpenMP's helpers spin for 300,000 turns before they sleep, some milliseconds for which another thread had use. These
# are about a hundred microseconds, longer than it is from one operation to the next. Read when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
