"""File formats of the replay buffer: rows, segments, index, lock."""
