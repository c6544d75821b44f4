"""What decides, without I/O and clock."""
