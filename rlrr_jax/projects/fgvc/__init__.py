"""FGVC: five fine-grained tasks, and their table; see configs/fgvc.py."""
