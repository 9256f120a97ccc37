#!/usr/bin/env bash
# Runs everything that needs a GPU, in sections with a time limit each: launch/gpu_suite.py says how. PYTHON names the
# interpreter (default python3); safecl need not be installed.
#
#   launch/gpu_suite.sh --minutes 9.5       as many sections as fit; call it again with what is left, and it goes on
#   launch/gpu_suite.sh --dry               every section's command at toy size, on the CPU
#   launch/gpu_suite.sh --list              the sections
cd "$(dirname "$0")/.." && exec "${PYTHON:-python3}" launch/gpu_suite.py "$@"
