"""From what was typed to a checked experiment: compose, check signatures and combinations, explain errors."""
