"""What stands at the other end of a connection in tests: messages made by hand, lines with faults, and bad peers."""
