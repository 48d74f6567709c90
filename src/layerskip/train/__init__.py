"""Training with layer dropout and the early-exit loss (LayerSkip, Elhoushi et al., ACL 2024).

Wraps transformers models and writes ordinary Hugging Face checkpoints. Knows nothing of our decoder: what was trained
here meets it only through such a folder.
"""
