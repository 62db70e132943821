"""Prompts to embeddings: tokenizers, T5, CLIP. Network code is transformers'; files are checked and read by us."""
