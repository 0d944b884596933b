"""Turns images and messages into a `ModelInput`, and ids into text. No modules, no devices."""
