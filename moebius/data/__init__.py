"""From text to batches of tokens: sources, tokenizer, shards on disk, deterministic stream."""
