"""The operations: each file holds one contract (formula, schema, reference, gradient) that faster kernels implement."""

from adamae_fast.ops import library as library
