"""What runs have left, gathered into a table, pictures and a page."""
