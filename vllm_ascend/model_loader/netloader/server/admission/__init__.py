"""Who is let in, and when: turns of those that take weights, the room of those that wait, hosts that misbehave."""
