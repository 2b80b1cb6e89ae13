"""The door: what the user types, reads and gets back."""
