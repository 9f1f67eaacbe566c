"""What vqfast has to know of other libraries' models."""
