"""What runs that differ in their seeds give together: means of their weights, and of their answers."""
