"""What is specific to one kind of device."""
