"""Pretrained weights: their names, downloads, file layouts, and how their images were prepared."""
