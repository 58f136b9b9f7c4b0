"""PACE, as losses: consistency of passes with noise on what was changed."""
