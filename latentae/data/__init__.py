"""Images in: shards, decoding, crops, batches, and the writer of shards. This room alone splits data over ranks and workers."""
