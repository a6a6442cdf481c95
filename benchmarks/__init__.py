"""Measure latency, load and accuracy. Installed as `regionspot.benchmarks`."""
