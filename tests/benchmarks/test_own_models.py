"""The three models of lesson 13 that are not in the course: the lesson can import each by its name."""

import subprocess
import sys

from labkit import files


def test_a_model_is_imported_from_the_root_of_the_repository():
    code = "from benchmarks import own_models; print(own_models.words.__name__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=files.ROOT, capture_output=True, text=True)
    assert done.stdout == "words\n", done.stderr
