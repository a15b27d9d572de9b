"""Count what the compiled kernels do: `python -m beit_fast.kernels.aot.counts`.

The executor counts instructions, accesses to memory and waits. The machine code has stall counts and scoreboards, which
bound the cycles of a loop. docs/counts.md explains the tables.
"""
