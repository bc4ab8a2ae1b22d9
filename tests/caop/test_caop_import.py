from __future__ import annotations

import subprocess
import sys


def test_the_package_works_where_torch_and_transformers_are_absent():
    program = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "triton", "tokenizers"):
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Absent())
import caop_fast.caop as caop
missing = [name for name in caop.__all__ if not hasattr(caop, name)]
assert not missing, missing
assert caop.OneOf()("K AE T Confidence: 0.70", {"answer": ["K AE T"]}).correct == 1
assert caop.TeacherContext(template="{prompt}", note="{confidence}").messages({"prompt": "q"})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
