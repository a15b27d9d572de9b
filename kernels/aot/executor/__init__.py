"""Execute the PTX of compiled kernels on a CPU with NumPy.

No GPU is needed.

| modules | hold |
|---|---|
| `errors`, `sites` | what goes wrong, and the instruction and threads where it happens |
| `ptx`, `parser`, `pointers` | a PTX module as objects |
| `dtypes`, `integers`, `floats`, `operations` | scalar arithmetic |
| `fragments`, `descriptors` | layouts of matrix operands |
| `registers`, `slots` | registers of all threads |
| `global_memory`, `shared_memory`, `local_memory`, `tensor_memory` | bounds and contents of memory |
| `access_log`, `global_log`, `proxies`, `async_copies`, `async_reads`, `warpgroup_products` | order of accesses |
| `live_barriers` | bytes that only mbarrier instructions may access |
| `kernel_code`, `instructions` | a kernel as steps of a machine |
| `machine`, `schedule`, `launch`, `counters` | execution |
| `parameters`, `driver`, `launchers` | launches of Triton and of this package |
"""
