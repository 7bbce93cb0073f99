"""Every file format, read strictly and written atomically."""
