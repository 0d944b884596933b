"""What each token of a reply looks at in the pictures."""
