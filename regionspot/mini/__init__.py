"""regionspot-mini: the embedded default. A procedural image world, and a small SAM and CLIP trained
on it.

`world` says what exists (categories, scenes), `render` draws it, `dataset` writes it as LVIS-format
JSON and images, `architecture` holds the small models' sizes, `pretrain_sam` and `pretrain_clip`
train them. `weights/` and `MODEL_CARD.md` hold what came out.
"""
