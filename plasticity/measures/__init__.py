"""What is measured of a network: unit activity, ranks, norms and rates, curvature, kernels, churn."""
