"""The model on a GPU: Triton kernels over the paged pool, and what strings them into a pass.

Every kernel runs in Triton's interpreter, too (TRITON_INTERPRET=1), on a CPU and slowly: that is
how tests compare it with torch where there is no GPU.
"""
