"""For all tests: they import dm_control and draw without going through our runner, so its precaution is taken here."""

from envs.graphics import load_compiler_first

load_compiler_first()
