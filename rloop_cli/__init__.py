"""The command line: what the user types, reads and gets back."""
