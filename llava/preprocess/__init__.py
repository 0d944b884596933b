"""Pictures and messages become a `ModelInput`; ids become text. No modules, no devices."""
