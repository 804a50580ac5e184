"""The ways to bring bytes from a server's memory into a client's, and how they are known to be the right ones."""
