"""From videos and questions on disk to packed batches; knows no JAX and no model."""
