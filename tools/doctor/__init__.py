"""What would keep Marina from working here, and the mend."""
