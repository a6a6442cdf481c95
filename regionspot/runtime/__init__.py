"""Run the model's graphs: one contract for their tensors, one Runner for each runtime, one pipeline
over all of it.
"""
