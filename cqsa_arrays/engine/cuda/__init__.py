"""Running a plan on one GPU: blocks come over the link while others are computed, finished rows leave beside them."""
