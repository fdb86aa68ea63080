"""Images: files in folders, lists and archives, decoded, resized and cropped."""
