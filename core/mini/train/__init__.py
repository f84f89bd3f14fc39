"""How the embedded model was made: `python -m forget_concept.core.mini.train all --work build/mini`.

Stages, each resumable and seeded: `data` (draw the pictures), `probe`, `autoencoder`, `text`, `unet`, `pack`.
"""
