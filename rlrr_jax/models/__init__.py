"""Models: plain, without any knowledge of how they are fine-tuned."""
