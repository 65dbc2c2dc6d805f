"""One file per framework: its keys in the words of a recipe."""
