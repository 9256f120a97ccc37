"""One self-contained HTML page per run, and one that compares runs: no scripts, nothing loaded from anywhere.

charts.py draws SVG, run.py and comparison.py read run folders, page.py fills the templates beside it. Imports no
DeepSpeed.
"""
