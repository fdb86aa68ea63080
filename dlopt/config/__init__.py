"""From what was typed to a checked experiment: compose, check against signatures, check combinations, explain errors."""
