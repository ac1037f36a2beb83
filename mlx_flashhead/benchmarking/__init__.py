"""What ``mlx_flashhead.benchmark`` and the scripts in ``benchmarks/`` measure with."""
