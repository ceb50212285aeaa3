"""Images in, WebDataset shards out and in, manifests."""
