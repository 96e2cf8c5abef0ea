"""Where the numbers in the documents come from."""
