"""The library: reading documents, encoding their texts and writing the embeddings as Beam transforms."""
