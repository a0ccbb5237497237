"""The encode command as one process of a test, with shards of three videos."""

from data_pipeline import store
from redvillm_jax import encode
from redvillm_jax.runtime import distributed

store.VIDEOS_PER_SHARD = 3
distributed.command(encode.main)
