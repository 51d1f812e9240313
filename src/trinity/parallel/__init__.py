"""Many devices: what shards, splits and exchanges around a model that knows nothing of it."""
