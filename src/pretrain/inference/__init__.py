"""Inference with trained models: text generation, mask filling, embeddings and predictions."""
