"""The commands of the course, which run, grade, report and publish the lessons. labkit never imports this package.

Open run.py first: a lesson as a program. Then cli.py, with a function for each command of ./lab:

    run, sweep        run (a lesson), sweep (a grid), watch and child (parent and process of a run), store (results),
                      failure (a failed run, explained), reference (runs kept in data/recorded/), process_tree
    report            report (the page), report_sweeps, tradeoffs (figures), results (reading result folders)
    start, release    notebooks (lessons, exercises, copies)
    grade             grade (a class), answers (running answers), totals (gradebooks), sandbox with landlock, seccomp
                      and syscalls (the walls around an answer)
    doctor, site      doctor, site/ with formulas
    elsewhere         hosted (Colab and others)
"""

import sys

# jsonschema, which nbformat checks notebooks with, imports this where JupyterLab has brought it along: 1.5 s of every
# process, for a form of international addresses that no notebook's schema asks for.
sys.modules.setdefault("rfc3987_syntax", None)
