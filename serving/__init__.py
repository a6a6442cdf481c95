"""Run artefacts in the Triton Inference Server. Installed as `regionspot.serving`."""
