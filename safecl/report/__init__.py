"""Self-contained HTML pages: one per run, and one that compares runs. They have no scripts and load nothing.

charts.py draws SVG, run.py and comparison.py read run folders, page.py fills the templates of this folder, card.py
writes the model card. Imports no DeepSpeed.
"""
