"""Early exits at test time: `leave` skips blocks, `choose` picks thresholds, see docs/exits.md."""
