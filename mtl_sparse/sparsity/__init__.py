"""Group sparsity: groups, proximal operators, the optimizer, statistics."""
