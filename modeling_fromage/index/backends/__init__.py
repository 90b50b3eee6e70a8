"""Ways of searching the embeddings of an index."""
