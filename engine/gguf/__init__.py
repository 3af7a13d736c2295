"""Reads models from GGUF files, the file format of llama.cpp.

`reader` checks and parses a file, `settings` and `vocabulary` translate its metadata into the texts of a checkpoint
folder in Hugging Face format, and `names` and `blocks` translate its tensors.
"""
