"""What looks at runs, models and methods and draws what it finds."""
