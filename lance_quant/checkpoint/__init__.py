"""Lance checkpoints on disk: layouts, strict streaming reads, writes, fingerprints."""
