"""What wraps a vector field, what it may answer, and whether its samples are independent."""
