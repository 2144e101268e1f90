"""Numbers in few bits: grids, what is calibrated and trained on them (SIMULATED), and what multiplies integers (REAL).

`from labkit.quantization import affine` and the like; one module an idea, under the name that the field gives it. Bytes
of what is stored: `labkit.artifact.size`; engines outside torch: `labkit.deploy.engines`.
"""
