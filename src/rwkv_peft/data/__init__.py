"""From JSONL files to batches of tokens."""
