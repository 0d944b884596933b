"""How llava-tiny is made: drawn scenes, questions about them, the pretrained parts, and the evaluation."""
