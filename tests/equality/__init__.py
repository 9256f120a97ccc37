"""Tools that show whether a change leaves every number and every file format as it was.

`record` trains some small runs and writes down all that they leave. `stopped_run` makes a run folder that later
versions must resume. Both reach safecl through its command line alone, so that no move of a module breaks them.
"""
