"""Check every compiled kernel against fp64 on the executor.

| modules | hold |
|---|---|
| `cases`, `table` | what is checked: operators with their inputs, for one compute capability each |
| `loops` | which kernels of a case run their loop twice and end it with a ragged step |
| `operators` | launchers, inputs and fp64 references of the operators |
| `patch_table`, `patch_embed` | the cases of patch embedding, which nvcc compiles, and its launcher |
| `check` | errors, budgets and hazards of a case |
| `plans`, `sources` | what a case launches, and from which source; both show which results are out of date |
| `rows`, `result_files` | the committed results, and whether they are current |
| `mutations`, `mutate`, `replay` | kernels broken on purpose, which the check must notice; see `mutants.md` |

`python -m beit_fast.kernels.aot.verify` runs the table and keeps the results; see `make verify-compiled`. The
references are those of `beit_fast.tuning`.
"""
