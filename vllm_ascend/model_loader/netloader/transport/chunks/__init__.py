"""Which chunks there are, which have come, and which a session asks for: the books of a transfer."""
