"""Many runs in one workdir: their folders, what they cost, and the search of the protocol "vtab"."""
