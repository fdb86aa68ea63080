"""One run: folder, lock, resume, exit code, environment."""
