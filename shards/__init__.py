"""Many samples of one bundle, in shards that are never drawn twice, by this process, several, or a cluster."""
