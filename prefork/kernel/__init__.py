"""What touches the system."""
