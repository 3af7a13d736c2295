"""Writes a checkpoint in another format: as a GGUF file, or as a folder with weights that are quantised already."""
