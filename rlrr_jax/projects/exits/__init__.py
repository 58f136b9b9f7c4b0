"""Early exits: losses `exits` and `met`, thresholds, curves, and prediction that skips blocks."""
