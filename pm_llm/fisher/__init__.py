"""Curvature of one task: the empirical Fisher, its diagonal or more of it, in one of four forms, each in one file.

    F = E_x[ g(x) o g(x) ],  g(x) = gradient of sum over answer tokens of log p(token | before)

The expectation is of the *square of each example's gradient*; the square of a batch gradient is a different, wrong
quantity. Taken at theta*_t = M_{t-1} + Delta_t: all adapters active, dropout off, no perturbation.

`dense`, `factored` and `kronecker` live in the space of the adapted weights W, `factors` in that of A and B. Every
form brings its own sum of past quadratics (:class:`Past`), whose size does not grow with the number of tasks.
"""
