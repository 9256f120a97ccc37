"""Reads the rows of files in any known format as messages; names rows and files that cannot be used."""
