"""Plain helpers that know nothing of dlopt: errors, values, number formats, files, locks, random streams."""
