"""The operations: each file holds one contract (formula, schema, reference, gradient) that faster kernels implement."""
