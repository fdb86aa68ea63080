"""What the commands share: their own keys and help, parsing of a line, refused keys, processes."""
