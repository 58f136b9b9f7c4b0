"""SNELL, as a method: a sparse change of every kernel, made by distances between inputs and outputs."""
