"""What a script uses."""
