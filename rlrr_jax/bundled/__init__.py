"""A tiny pretrained ViT and two small tasks, and the scripts that made them; see README.md."""
