"""Programs that show llava at work."""
