"""Annotation files, feature caches and the batches made from them."""
