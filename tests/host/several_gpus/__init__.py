"""A package, or what pytest sets up for this folder would last to the end of all tests."""
