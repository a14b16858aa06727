"""What each exit says."""
