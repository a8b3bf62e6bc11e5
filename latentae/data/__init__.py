"""Data: shards, decoding, crops, batches. Only this package splits data over ranks and workers."""
