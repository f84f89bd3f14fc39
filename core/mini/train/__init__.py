"""Training of the embedded model: `python -m forget_concept.core.mini.train all --work build/mini`.

The stages are resumable and seeded: `data` (render the images), `tokenizer`, `probe`, `autoencoder`, `text`, `unet` and
`pack`.
"""
