"""Image-text pairs streamed from WebDataset shards."""
