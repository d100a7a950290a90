"""For all tests: they import dm_control and draw without going through our runner, so its precaution is taken here."""

from hypothesis import settings

from envs.graphics import load_compiler_first

load_compiler_first()

# A busy machine must not make a property fail; the timeout of pyproject.toml holds for all tests.
settings.register_profile("neoteny", deadline=None)
settings.load_profile("neoteny")
