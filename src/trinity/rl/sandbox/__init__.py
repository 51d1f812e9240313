"""Programs that a model wrote, run apart from the machine.

`pool.Sandbox` is what others use. The modules that run inside (`guest`, `program`, `view`, `kernel`, `seccomp`) import
the standard library alone: they run in an interpreter that sees nothing else.
"""
