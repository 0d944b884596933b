"""What can be run to see llava at work."""
