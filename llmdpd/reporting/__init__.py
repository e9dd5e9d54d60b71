"""The report page: reading run folders, comparing them, drawing figures, writing one self-contained HTML file."""
