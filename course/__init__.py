"""The commands of the course: they run, grade, report and publish the lessons. labkit knows nothing of them."""

import sys

# jsonschema, which nbformat checks notebooks with, imports this where JupyterLab has brought it along: 1.5 s of every
# process, for a form of international addresses that no notebook's schema asks for.
sys.modules.setdefault("rfc3987_syntax", None)
