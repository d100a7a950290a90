"""For all tests: they import dm_control and draw without going through our runner, so its precaution is taken here."""

import os

# Tests run side by side: threads of their own would wait for one another on the same cores. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings  # noqa: E402

from envs.graphics import load_compiler_first  # noqa: E402

load_compiler_first()

# A busy machine must not make a property fail; the timeout of pyproject.toml holds for all tests.
settings.register_profile("neoteny", deadline=None)
settings.load_profile("neoteny")
