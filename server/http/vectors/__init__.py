"""Runs requests whose answers are made of vectors: embeddings, classes, scores and the probabilities of labels."""
