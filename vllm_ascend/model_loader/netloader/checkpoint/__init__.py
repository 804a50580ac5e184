"""The files of a checkpoint: how they are recognised, and whether they stayed as they were while they were read."""
