"""Training: `run` builds everything, `loop` is the loop."""
