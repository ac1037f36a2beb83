"""FlashHead inside mlx-lm: find and replace a model's head, load, decode, patch."""
