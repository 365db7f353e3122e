"""What a guest asked of its disk, in a file: the layout, who writes it, who reads it."""
