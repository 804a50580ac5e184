"""The `netloader` command."""
