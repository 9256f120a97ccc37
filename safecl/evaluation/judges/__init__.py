"""Judges: models that decide whether answers are harmful. One kind a file; panel.py compares several; kept.py judges
recorded answers, and worker.py does so in a process of its own."""
