"""One source that is asked: the conversation with it, from the connection to the confirmation."""
