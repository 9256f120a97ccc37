"""Files that are whole or absent, locks, sizes, the cache folder, model folders."""
