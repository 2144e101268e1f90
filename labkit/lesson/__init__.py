"""A lesson's page at work: the Lab that `labkit.start` returns, and all that a Lab hands its work to.

Open `session.py` first: its docstring is a whole session in ten lines, and the class `Lab` lists the steps of a page.

session.py: start, the Lab
parameters.py: names, defaults and ranges of a lesson's parameters
predictions.py: guesses before a measurement
calibration.py: how far off the guesses were
results.py: recorded numbers, texts and tables by name
records.py: the record of a run: the file, and the meaning of each number
reference_runs.py: committed runs of other machines, to compare with
other_processes.py: numbers of a recording's other processes
summary.py: a finished run in a few lines
timings.py: timings as lines or as a folded table
roofs.py: measured ceilings of the session's devices
claims.py: claims.toml, and the verdict of a value
claim_tests.py: the tested claims of a session
check.py: the frame of an exercise check
exercises.py: answers of a session
worked.py: worked answers
settings.py: settings of the process, put back after an answer
challenge.py: a goal on a plane, and a plan
experiments.py: records of long experiments
on_gpu.py: sections that need a GPU, and their bounds where none is
gpu_trace.py: launches and kernels of a call, as a picture
"""
