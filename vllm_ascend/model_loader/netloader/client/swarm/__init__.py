"""What is shared by the sessions of a fetch: which chunk is asked of whom, and with whom there are sessions."""
