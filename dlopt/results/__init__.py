"""The report on finished runs: table, plots and page."""
