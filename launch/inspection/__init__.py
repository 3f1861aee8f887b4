"""What a dataset holds: rows looked at in one pass, likeness between them, the lines of the screen, the page."""
