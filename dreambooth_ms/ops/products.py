"""Products of matrices: one instance of each operator, for all cells."""

from mindspore import ops

times, times_transposed, transposed_times = ops.MatMul(), ops.MatMul(transpose_b=True), ops.MatMul(transpose_a=True)
"""A B, A B^T and A^T B."""

batch_times, batch_times_transposed = ops.BatchMatMul(), ops.BatchMatMul(transpose_b=True)
batch_transposed_times = ops.BatchMatMul(transpose_a=True)
"""The same of each of a batch."""
