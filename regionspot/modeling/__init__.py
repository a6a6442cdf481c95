"""The model: frozen SAM and CLIP, the head that reads both, its losses, checkpoints and presets."""
