"""How llava-tiny is made: a world of drawn scenes, questions about them, the parts it starts from, and its scores."""
