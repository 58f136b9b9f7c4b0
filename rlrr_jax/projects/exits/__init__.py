"""Early exits: the loss `exits`, the method `met`, thresholds, and prediction that skips blocks."""
