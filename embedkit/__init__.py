"""embedkit: a frozen 2D backbone reads every 3D scan once; heads and search then work on its cached tokens."""
