"""All that needs a GPU in one command, `labkit gpu`: steps within a time budget, what goes there, what comes back.

steps runs tests, lessons and benchmarks and resumes; packing brings results home in small parts; trips and wheels take
packages and models to a machine without a network; command is the command line.
"""
