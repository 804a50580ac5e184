"""What two peers say to each other, and the connections over which they say it."""
